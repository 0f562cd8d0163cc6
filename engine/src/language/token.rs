//! The tokens of an expression, and the names that it refers to.
//!
//! Knows tera's words but not their meaning. Invariant: an expression that
//! passes [`tokens`] is short, shallow, and cannot leave the place in a template
//! where it is put, so handing it to tera is safe.

use super::expr::ExprError;
use super::suggest;

/// Longest expression, in bytes.
const MAX_LEN: usize = 1_000;
/// Deepest nesting of brackets: the grammar's cost doubles with each.
const MAX_NESTING: usize = 6;
/// The only functions that give the same at any time.
const FUNCTIONS: [&str; 1] = ["range"];
const KEYWORDS: [&str; 9] = [
    "true", "false", "True", "False", "and", "or", "not", "in", "is",
];

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A name.
    Word,
    /// A number.
    Number,
    /// Text in quotes.
    Text,
    /// One other character.
    Sign,
}

/// One token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) kind: Kind,
    pub(crate) text: &'a str,
    pub(crate) start: usize,
}

impl Token<'_> {
    fn end(&self) -> usize {
        self.start + self.text.len()
    }
}

/// One step of a reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment {
    /// A fixed name or index.
    Key(String),
    /// `[name]`: known only when evaluated.
    Dynamic,
}

/// A name that an expression refers to: `params.n`, `models["a-b"].model`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference<'a> {
    /// As written.
    pub(crate) text: &'a str,
    /// Where it starts.
    pub(crate) start: usize,
    /// Its steps; the first is a `Key`.
    pub(crate) segments: Vec<Segment>,
    /// `default` or `is defined` follows.
    pub(crate) may_be_absent: bool,
}

impl Reference<'_> {
    /// The first name.
    pub(crate) fn root(&self) -> &str {
        match self.segments.first() {
            Some(Segment::Key(name)) => name,
            _ => "",
        }
    }

    /// The first `depth` steps, joined by dots.
    pub(crate) fn prefix(&self, depth: usize) -> String {
        let names = self.segments.iter().take(depth).map(|s| match s {
            Segment::Key(name) => name.as_str(),
            Segment::Dynamic => "[…]",
        });
        names.collect::<Vec<_>>().join(".")
    }
}

/// Splits an expression into tokens.
///
/// # Errors
/// When it is too long or too deep, or holds what would end the expression.
pub(crate) fn tokens(source: &str) -> Result<Vec<Token<'_>>, ExprError> {
    let wrong = |snippet: &str, message: &str| ExprError {
        skip: 0,
        snippet: snippet.to_owned(),
        code: "expression",
        message: message.to_owned(),
        help: None,
    };
    if source.len() > MAX_LEN {
        return Err(wrong(
            "",
            &format!("an expression of more than {MAX_LEN} characters"),
        ));
    }
    let mut tokens: Vec<Token<'_>> = Vec::new();
    let mut at = 0;
    let mut nesting = 0_usize;
    while let Some(c) = source.get(at..).and_then(|s| s.chars().next()) {
        let rest = &source[at..];
        let while_ = |f: fn(char) -> bool| rest.find(|c| !f(c)).unwrap_or(rest.len());
        let (kind, len) = match c {
            ' ' | '\t' | '\n' | '\r' => {
                at += 1;
                continue;
            }
            '"' | '\'' | '`' => match rest[1..].find(c) {
                Some(end) => (Kind::Text, end + 2),
                None => return Err(wrong(rest, "a quote without its end")),
            },
            'a'..='z' | 'A'..='Z' | '_' => (
                Kind::Word,
                while_(|c| c.is_ascii_alphanumeric() || c == '_'),
            ),
            '0'..='9' => {
                // After a dot it is an index (`list.0.1`), else it may be a fraction.
                let dotted = tokens
                    .last()
                    .is_some_and(|t| t.text == "." && t.end() == at);
                let len = if dotted {
                    while_(|c| c.is_ascii_alphanumeric() || c == '_')
                } else {
                    while_(|c| c.is_ascii_digit() || c == '.')
                };
                (Kind::Number, len)
            }
            '(' | '[' => {
                nesting += 1;
                (Kind::Sign, 1)
            }
            ')' | ']' => {
                nesting = nesting.saturating_sub(1);
                (Kind::Sign, 1)
            }
            '+' | '-' | '*' | '/' | '<' | '>' | '=' | '!' | '~' | '|' | ',' | '.' => {
                (Kind::Sign, 1)
            }
            // `%}` would end the tag.
            '%' if !rest.starts_with("%}") => (Kind::Sign, 1),
            other => {
                let message = format!("`{other}` has no meaning in an expression");
                return Err(wrong(&rest[..c.len_utf8()], &message));
            }
        };
        if nesting > MAX_NESTING {
            return Err(wrong("", &format!("brackets more than {MAX_NESTING} deep")));
        }
        tokens.push(Token {
            kind,
            text: &rest[..len],
            start: at,
        });
        at += len;
    }
    // A `-` at the end would join the end of the tag.
    if tokens.last().is_some_and(|t| t.text == "-") {
        return Err(wrong(
            source,
            &format!("`{source}` is not a valid expression"),
        ));
    }
    Ok(tokens)
}

/// The names that an expression refers to, in order.
///
/// # Errors
/// A call of a function that is not offered.
pub(crate) fn references<'a>(
    source: &'a str,
    tokens: &[Token<'a>],
) -> Result<Vec<Reference<'a>>, ExprError> {
    let sign = |i: usize, text: &str| tokens.get(i).is_some_and(|t| t.text == text);
    let mut found = Vec::new();
    let mut i = 0;
    while let Some(token) = tokens.get(i) {
        if token.kind != Kind::Word || KEYWORDS.contains(&token.text) {
            i += 1;
            continue;
        }
        let after_is =
            i > 0 && (sign(i - 1, "is") || (sign(i - 1, "not") && i > 1 && sign(i - 2, "is")));
        // After a dot: the rest of a reference with a `[…]` in it.
        let named = after_is || (i > 0 && (sign(i - 1, "|") || sign(i - 1, ".")));
        let keyword_argument = sign(i + 1, "=") && !sign(i + 2, "=");
        if named || keyword_argument {
            i += 1;
            continue;
        }
        if sign(i + 1, "(") {
            if !FUNCTIONS.contains(&token.text) {
                let message = format!("there is no function `{}`", token.text);
                return Err(ExprError {
                    skip: 0,
                    snippet: token.text.to_owned(),
                    code: "expression",
                    message,
                    help: suggest::help(token.text, "functions", FUNCTIONS),
                });
            }
            i += 1;
            continue;
        }
        let (next, segments) = path(tokens, i);
        let end = tokens[next - 1].end();
        let may_be_absent = (sign(next, "|") && sign(next + 1, "default"))
            || (sign(next, "is")
                && (next + 1..next + 3).any(|i| sign(i, "defined") || sign(i, "undefined")));
        found.push(Reference {
            text: &source[token.start..end],
            start: token.start,
            segments,
            may_be_absent,
        });
        i = next;
    }
    Ok(found)
}

/// The steps of the reference that starts at token `i`, and the token after it.
fn path(tokens: &[Token<'_>], start: usize) -> (usize, Vec<Segment>) {
    let mut segments = vec![Segment::Key(tokens[start].text.to_owned())];
    let mut i = start + 1;
    loop {
        match (tokens.get(i), tokens.get(i + 1), tokens.get(i + 2)) {
            (Some(dot), Some(name), _)
                if dot.text == "."
                    && matches!(name.kind, Kind::Word | Kind::Number)
                    && name.start == dot.end() =>
            {
                segments.push(Segment::Key(name.text.to_owned()));
                i += 2;
            }
            (Some(open), Some(inner), Some(close))
                if open.text == "["
                    && open.start == tokens[i - 1].end()
                    && matches!(inner.kind, Kind::Text | Kind::Number)
                    && close.text == "]" =>
            {
                let quoted = inner.kind == Kind::Text;
                let cut = usize::from(quoted);
                let name = &inner.text[cut..inner.text.len() - cut];
                segments.push(Segment::Key(name.to_owned()));
                i += 3;
            }
            (Some(open), Some(inner), _)
                if open.text == "["
                    && open.start == tokens[i - 1].end()
                    && inner.kind == Kind::Word =>
            {
                // `[item.x]`: its own reference, found when the walk goes on inside.
                segments.push(Segment::Dynamic);
                return (i, segments);
            }
            _ => return (i, segments),
        }
    }
}
