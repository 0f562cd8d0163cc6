//! [`Diagnostic`]: one mistake in a pipeline file, or what may be one, with its place and a remedy.
//!
//! Knows how to show itself as plain text, and nothing of colours or terminals.
//! Invariant: `line` and `column` agree with `offset` in `source`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::finding::Severity;

/// One mistake.
#[derive(Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// Whether it is one for certain.
    pub severity: Severity,
    /// The file it is in.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column, from 1, in characters.
    pub column: usize,
    /// Bytes from `offset` that the mistake covers; never past the end of the line.
    pub len: usize,
    /// Byte offset in `source`.
    pub offset: usize,
    /// Stable name of the kind of mistake (`unknown-step`).
    pub code: &'static str,
    /// What is wrong.
    pub message: String,
    /// Short text beside the caret; may be empty.
    pub label: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Further places that belong to it: where a step definition is used.
    pub notes: Vec<String>,
    /// Text of the file, without a byte order mark.
    pub source: Arc<str>,
}

impl std::fmt::Debug for Diagnostic {
    /// As the user sees it: the whole source would drown the mistake.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.render_plain())
    }
}

impl Diagnostic {
    /// The mistake as plain text: `file:line:column: error: …` (or `warning`), the line, a caret, the help.
    #[must_use]
    pub fn render_plain(&self) -> String {
        let mut out = format!(
            "{}:{}:{}: {}: {}\n",
            self.file.display(),
            self.line,
            self.column,
            self.severity.word(),
            printable(&self.message)
        );
        let (start, line) = line_at(&self.source, self.offset);
        let number = self.line.to_string();
        let margin = " ".repeat(number.len());
        if !line.is_empty() {
            let before = line
                .get(..self.offset - start)
                .unwrap_or("")
                .chars()
                .count();
            let marked = self
                .source
                .get(self.offset..self.offset + self.len)
                .unwrap_or("");
            let (text, before) = window(line, before);
            let room = text.chars().count().saturating_sub(before).max(1);
            let carets = "^".repeat(marked.chars().count().clamp(1, room));
            out.push_str(&format!("{margin} |\n{number} | {}\n", printable(&text)));
            let caret_line = format!("{margin} | {}{carets} {}", " ".repeat(before), self.label);
            out.push_str(caret_line.trim_end());
            out.push('\n');
        }
        for note in &self.notes {
            out.push_str(&format!("{margin} = note: {}\n", printable(note)));
        }
        if let Some(help) = &self.help {
            let indent = format!("\n{margin}         ");
            out.push_str(&format!(
                "{margin} = help: {}\n",
                printable(help).replace('\n', &indent)
            ));
        }
        out
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render_plain())
    }
}

/// All mistakes of a pipeline, file by file, each in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Diagnostics {
    /// The mistakes, or what may be some; never empty when returned as an error.
    pub errors: Vec<Diagnostic>,
}

impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, error) in self.errors.iter().enumerate() {
            if i > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Diagnostics {}

impl From<Diagnostic> for Diagnostics {
    fn from(error: Diagnostic) -> Self {
        Self {
            errors: vec![error],
        }
    }
}

/// A mistake that has no place inside a file (it cannot be read at all).
pub(crate) fn of_file(
    file: &Path,
    code: &'static str,
    message: String,
    help: Option<String>,
) -> Diagnostic {
    Diagnostic {
        severity: Severity::Error,
        file: file.to_path_buf(),
        line: 1,
        column: 1,
        len: 0,
        offset: 0,
        code,
        message,
        label: String::new(),
        help,
        notes: Vec::new(),
        source: Arc::from(""),
    }
}

/// The line that holds `offset`, without its line break, and where it starts.
fn line_at(source: &str, offset: usize) -> (usize, &str) {
    let (head, tail) = source.split_at_checked(offset).unwrap_or((source, ""));
    let start = head.rfind('\n').map_or(0, |i| i + 1);
    let end = tail.find('\n').map_or(source.len(), |i| head.len() + i);
    let line = source.get(start..end).unwrap_or("");
    (start, line.strip_suffix('\r').unwrap_or(line))
}

/// Cuts a very long line around the column `at`, so that one line of output stays readable.
fn window(line: &str, at: usize) -> (String, usize) {
    const WIDTH: usize = 160;
    let count = line.chars().count();
    if count <= WIDTH {
        return (line.to_owned(), at);
    }
    let from = at.saturating_sub(WIDTH / 2);
    let mut text: String = line.chars().skip(from).take(WIDTH).collect();
    if from + WIDTH < count {
        text.push('…');
    }
    if from == 0 {
        return (text, at);
    }
    (format!("…{text}"), at - from + 1)
}

/// The text with control characters made visible, so that a file cannot steer a terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\t' => ' ',
            '\n' => '\n',
            c if c.is_control() || ('\u{202a}'..='\u{202e}').contains(&c) => '\u{fffd}',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(source: &str, offset: usize, len: usize) -> Diagnostic {
        Diagnostic {
            severity: Severity::Error,
            file: "a.yaml".into(),
            line: source[..offset].matches('\n').count() + 1,
            column: 1,
            len,
            offset,
            code: "test",
            message: "wrong".into(),
            label: "here".into(),
            help: Some("do this".into()),
            notes: vec![],
            source: source.into(),
        }
    }

    #[test]
    fn caret_counts_characters() {
        let text = "é: ü\r\nß: [ä, x]\r\n";
        let offset = text.find('x').unwrap_or(0);
        let shown = at(text, offset, 1).render_plain();
        assert_eq!(
            shown,
            "a.yaml:2:1: error: wrong\n  |\n2 | ß: [ä, x]\n  |        ^ here\n  = help: do this\n"
        );
    }

    #[test]
    fn control_characters_are_not_printed() {
        let shown = at("a: \u{1b}[31mred", 0, 1).render_plain();
        assert!(!shown.contains('\u{1b}'), "{shown}");
    }

    #[test]
    fn a_long_line_is_cut_around_the_caret() {
        let text = format!("{}X{}", "a".repeat(500), "b".repeat(500));
        let shown = at(&text, 500, 1).render_plain();
        assert!(shown.lines().all(|l| l.chars().count() < 180), "{shown}");
        let lines: Vec<&str> = shown.lines().collect();
        let caret = lines[3].chars().position(|c| c == '^');
        assert_eq!(caret, lines[2].chars().position(|c| c == 'X'));
    }
}
