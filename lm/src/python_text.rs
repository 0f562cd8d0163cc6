//! Python's own text functions where Rust's differ: lines, stripping,
//! docstring cleaning and rounding. Prompts and parsers follow DSPy byte for
//! byte, and DSPy uses these.

/// Whether Python's `str.strip` removes the character.
pub(crate) fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's `text.strip()`.
pub fn strip(text: &str) -> &str {
    text.trim_matches(is_python_space)
}

/// Python's `text.splitlines()`: ten line ends, `\r\n` as one; no empty last line.
pub(crate) fn splitlines(text: &str) -> Vec<&str> {
    let mut lines = Vec::new();
    let mut start = 0;
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if !is_line_end(c) {
            continue;
        }
        lines.push(&text[start..at]);
        start = at + c.len_utf8();
        if c == '\r'
            && let Some((next, '\n')) = chars.peek().copied()
        {
            chars.next();
            start = next + 1;
        }
    }
    if start < text.len() {
        lines.push(&text[start..]);
    }
    lines
}

fn is_line_end(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// Python's `inspect.cleandoc`: tabs to spaces, the common indentation of all
/// lines but the first removed, empty first and last lines dropped.
pub(crate) fn cleandoc(text: &str) -> String {
    let expanded = expand_tabs(text);
    let mut lines: Vec<String> = expanded.split('\n').map(str::to_owned).collect();
    let margin = lines
        .iter()
        .skip(1)
        .filter_map(|line| {
            let content = line.trim_start_matches(is_python_space);
            (!content.is_empty()).then(|| line.chars().count() - content.chars().count())
        })
        .min();
    lines[0] = lines[0].trim_start_matches(is_python_space).to_owned();
    if let Some(margin) = margin {
        for line in lines.iter_mut().skip(1) {
            *line = line.chars().skip(margin).collect();
        }
    }
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    let first = lines
        .iter()
        .position(|line| !line.is_empty())
        .unwrap_or(lines.len());
    lines[first..].join("\n")
}

/// Python's `text.expandtabs()` with stops every 8 columns.
fn expand_tabs(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' => {
                let width = 8 - column % 8;
                out.extend(std::iter::repeat_n(' ', width));
                column += width;
            }
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}

/// Python's `textwrap.dedent`: the longest common run of spaces and tabs removed from every
/// line; lines of blanks alone become empty.
pub(crate) fn dedent(text: &str) -> String {
    let lines: Vec<&str> = text
        .split('\n')
        .map(|line| {
            if line.trim_matches([' ', '\t']).is_empty() {
                ""
            } else {
                line
            }
        })
        .collect();
    let mut margin: Option<&str> = None;
    for line in lines.iter().filter(|line| !line.is_empty()) {
        let indent = &line[..line.len() - line.trim_start_matches([' ', '\t']).len()];
        margin = Some(match margin {
            None => indent,
            Some(margin) => {
                let common = margin
                    .bytes()
                    .zip(indent.bytes())
                    .take_while(|(a, b)| a == b)
                    .count();
                &margin[..common]
            }
        });
    }
    let margin = margin.unwrap_or_default();
    let dedented: Vec<&str> = lines
        .iter()
        .map(|line| line.strip_prefix(margin).unwrap_or(line))
        .collect();
    dedented.join("\n")
}

/// Python's `round(value, digits)`: half to even on the exact binary value.
pub fn round(value: f64, digits: usize) -> f64 {
    format!("{value:.digits$}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_where_python_ends_them() {
        assert_eq!(
            splitlines("a\r\nb\rc\u{85}d\u{2028}e\n"),
            ["a", "b", "c", "d", "e"]
        );
        assert_eq!(splitlines("a\n\nb"), ["a", "", "b"]);
        assert_eq!(splitlines("\n"), [""]);
        assert!(splitlines("").is_empty());
    }

    #[test]
    fn strip_takes_what_python_takes() {
        assert_eq!(strip("\u{1f}\u{a0}x\u{3000}\u{85}"), "x");
        assert_eq!(strip("\u{feff}x\u{200b}"), "\u{feff}x\u{200b}");
    }

    #[test]
    fn docstrings_are_cleaned() {
        assert_eq!(
            cleandoc("One.\n    Two.\n      Three.\n    "),
            "One.\nTwo.\n  Three."
        );
        assert_eq!(cleandoc("\n    All.\n    Second.\n    "), "All.\nSecond.");
        assert_eq!(cleandoc(""), "");
        assert_eq!(cleandoc("\tx\n\ty"), "x\ny");
    }

    #[test]
    fn dedent_removes_the_common_indent() {
        assert_eq!(dedent("  a\n    b\n   \n  c"), "a\n  b\n\nc");
        assert_eq!(dedent(" \ta\n  b"), "\ta\n b");
    }

    #[test]
    fn rounding_is_half_to_even_on_the_exact_value() {
        for (value, rounded) in [
            (100.0 * 3.0 / 160.0, 1.88),
            (100.0 / 160.0, 0.62),
            (0.125, 0.12),
            (3.125, 3.12),
            (2.675, 2.67),
            (66.666_666, 66.67),
        ] {
            assert_eq!(round(value, 2), rounded);
        }
    }
}
