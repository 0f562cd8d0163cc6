//! Reads values out of model answers as DSPy does: JSON first (`json.loads`),
//! then a Python literal (`ast.literal_eval`). Knows no field types; nesting is
//! bounded, so that no answer can exhaust the stack.

use crate::value::{Fields, Value};

/// Python's `json.loads`; `None` where it raises. NaN and the infinities are read at top level.
pub(crate) fn parse_json(text: &str) -> Option<Value> {
    let text = text.trim_matches([' ', '\t', '\n', '\r']);
    match text {
        "NaN" => Some(Value::Float(f64::NAN)),
        "Infinity" => Some(Value::Float(f64::INFINITY)),
        "-Infinity" => Some(Value::Float(f64::NEG_INFINITY)),
        _ => serde_json::from_str(text).ok(),
    }
}

/// Python's `ast.literal_eval`; `None` where it raises. Tuples and sets become lists;
/// dictionaries with keys other than texts, byte strings and complex numbers are refused.
pub(crate) fn parse_python(text: &str) -> Option<Value> {
    let mut reader = Reader {
        rest: text,
        depth: 0,
    };
    let first = reader.value()?;
    if reader.eat(',') {
        return reader.items_until(None, vec![first]).map(Value::List);
    }
    reader.at_end().then_some(first)
}

const MAX_DEPTH: usize = 100;

struct Reader<'a> {
    rest: &'a str,
    depth: usize,
}

impl Reader<'_> {
    fn skip_space(&mut self) {
        self.rest = self
            .rest
            .trim_start_matches([' ', '\t', '\n', '\r', '\u{c}']);
    }

    fn at_end(&mut self) -> bool {
        self.skip_space();
        self.rest.is_empty()
    }

    fn eat(&mut self, c: char) -> bool {
        self.skip_space();
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn value(&mut self) -> Option<Value> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return None;
        }
        self.skip_space();
        let value = match self.rest.chars().next()? {
            '\'' | '"' => self.text().map(Value::Str),
            '[' => {
                self.eat('[');
                self.items_until(Some(']'), Vec::new()).map(Value::List)
            }
            '(' => self.tuple(),
            '{' => self.braces(),
            '0'..='9' | '.' | '+' | '-' => self.number(),
            _ => self.word(),
        };
        self.depth -= 1;
        value
    }

    /// The items up to the closing bracket, or to the end of the text; a comma was just eaten
    /// when `items` is not empty.
    fn items_until(&mut self, close: Option<char>, mut items: Vec<Value>) -> Option<Vec<Value>> {
        loop {
            match close {
                Some(close) if self.eat(close) => return Some(items),
                None if self.at_end() => return Some(items),
                _ => {}
            }
            items.push(self.value()?);
            if !self.eat(',') {
                return match close {
                    Some(close) => self.eat(close),
                    None => self.at_end(),
                }
                .then_some(items);
            }
        }
    }

    fn tuple(&mut self) -> Option<Value> {
        self.eat('(');
        if self.eat(')') {
            return Some(Value::List(Vec::new()));
        }
        let first = self.value()?;
        if self.eat(')') {
            return Some(first);
        }
        if !self.eat(',') {
            return None;
        }
        self.items_until(Some(')'), vec![first]).map(Value::List)
    }

    fn braces(&mut self) -> Option<Value> {
        self.eat('{');
        if self.eat('}') {
            return Some(Value::Dict(Fields::new()));
        }
        let first = self.value()?;
        if !self.eat(':') {
            if self.eat('}') {
                return Some(Value::List(vec![first]));
            }
            return if self.eat(',') {
                self.items_until(Some('}'), vec![first]).map(Value::List)
            } else {
                None
            };
        }
        let mut fields = Fields::new();
        let mut key = first;
        loop {
            let Value::Str(name) = key else { return None };
            fields.insert(name, self.value()?);
            if self.eat('}') {
                return Some(Value::Dict(fields));
            }
            if !self.eat(',') {
                return None;
            }
            if self.eat('}') {
                return Some(Value::Dict(fields));
            }
            key = self.value()?;
            if !self.eat(':') {
                return None;
            }
        }
    }

    fn text(&mut self) -> Option<String> {
        let quote = self.rest.chars().next()?;
        let triple: String = std::iter::repeat_n(quote, 3).collect();
        let (end, multi_line) = if self.rest.starts_with(&triple) {
            (triple, true)
        } else {
            (quote.to_string(), false)
        };
        self.rest = &self.rest[end.len()..];
        let mut out = String::new();
        loop {
            if let Some(rest) = self.rest.strip_prefix(end.as_str()) {
                self.rest = rest;
                return Some(out);
            }
            let c = self.take()?;
            match c {
                '\\' => self.escape(&mut out)?,
                '\n' | '\r' if !multi_line => return None,
                c => out.push(c),
            }
        }
    }

    fn take(&mut self) -> Option<char> {
        let c = self.rest.chars().next()?;
        self.rest = &self.rest[c.len_utf8()..];
        Some(c)
    }

    fn escape(&mut self, out: &mut String) -> Option<()> {
        match self.take()? {
            '\n' => {}
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'r' => out.push('\r'),
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'v' => out.push('\u{b}'),
            'x' => out.push(self.hex(2)?),
            'u' => out.push(self.hex(4)?),
            'U' => out.push(self.hex(8)?),
            c @ ('\\' | '\'' | '"') => out.push(c),
            c @ '0'..='7' => {
                let mut code = c.to_digit(8)?;
                for _ in 0..2 {
                    let Some(digit) = self.rest.chars().next().and_then(|c| c.to_digit(8)) else {
                        break;
                    };
                    self.take();
                    code = code * 8 + digit;
                }
                out.push(char::from_u32(code)?);
            }
            c => {
                out.push('\\');
                out.push(c);
            }
        }
        Some(())
    }

    fn hex(&mut self, digits: usize) -> Option<char> {
        let code = self.rest.get(..digits)?;
        if !code.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        self.rest = &self.rest[digits..];
        char::from_u32(u32::from_str_radix(code, 16).ok()?)
    }

    fn number(&mut self) -> Option<Value> {
        let mut negative = false;
        while let Some(sign @ ('+' | '-')) = self.rest.chars().next() {
            negative ^= sign == '-';
            self.take();
            self.skip_space();
        }
        let mut previous = ' ';
        let length = self
            .rest
            .find(|c: char| {
                let sign_of_exponent = matches!(c, '+' | '-') && matches!(previous, 'e' | 'E');
                previous = c;
                !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_') || sign_of_exponent)
            })
            .unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(length);
        self.rest = rest;
        let value = number_token(token)?;
        Some(match (negative, value) {
            (true, Value::Int(int)) => Value::Int(int.checked_neg()?),
            (true, Value::Float(float)) => Value::Float(-float),
            (_, value) => value,
        })
    }

    fn word(&mut self) -> Option<Value> {
        let length = self
            .rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(length);
        self.rest = rest;
        match word {
            "None" => Some(Value::Null),
            "True" => Some(Value::Bool(true)),
            "False" => Some(Value::Bool(false)),
            _ => None,
        }
    }
}

/// A Python number without its sign.
fn number_token(token: &str) -> Option<Value> {
    if token.starts_with('_') || token.ends_with('_') || token.contains("__") {
        return None;
    }
    let digits = token.replace('_', "");
    let lower = digits.to_ascii_lowercase();
    for (prefix, radix) in [("0x", 16), ("0o", 8), ("0b", 2)] {
        if let Some(digits) = lower.strip_prefix(prefix) {
            return i64::from_str_radix(digits, radix).ok().map(Value::Int);
        }
    }
    if digits.bytes().all(|b| b.is_ascii_digit()) {
        let leading_zero = digits.len() > 1 && digits.starts_with('0');
        if leading_zero && digits.bytes().any(|b| b != b'0') {
            return None;
        }
        return match digits.parse() {
            Ok(int) => Some(Value::Int(int)),
            Err(_) => digits.parse().ok().map(Value::Float),
        };
    }
    let is_float = lower
        .bytes()
        .all(|b| b.is_ascii_digit() || b".e+-".contains(&b))
        && lower.bytes().any(|b| b.is_ascii_digit());
    if is_float {
        lower.parse().ok().map(Value::Float)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn python_literals_are_read() {
        for (text, repr) in [
            ("'a'", "'a'"),
            ("\"it's\"", "\"it's\""),
            ("[1, 2.5, True, None]", "[1, 2.5, True, None]"),
            ("(1,)", "[1]"),
            ("(1)", "1"),
            ("1, 2", "[1, 2]"),
            ("1,000", "[1, 0]"),
            ("{'a': [1], 'b': {}}", "{'a': [1], 'b': {}}"),
            ("{1, 2}", "[1, 2]"),
            ("-1_000", "-1000"),
            ("1e3", "1000.0"),
            (".5", "0.5"),
            ("0x1f", "31"),
            ("'''a\nb'''", "'a\\nb'"),
            ("'\\x41\\u00e9'", "'Aé'"),
        ] {
            assert_eq!(parse_python(text).unwrap().to_python_repr(), repr, "{text}");
        }
    }

    #[test]
    fn what_is_no_literal_is_refused() {
        for text in [
            "abc", "a, b", "007", "1 2", "[1", "'a", "f(1)", "", "{1: 2}", "1+1j", "nan",
        ] {
            assert_eq!(parse_python(text), None, "{text}");
        }
        assert_eq!(parse_python(&"[".repeat(100_000)), None);
    }

    #[test]
    fn json_is_read_as_python_reads_it() {
        assert_eq!(parse_json(" 3.0 "), Some(Value::Float(3.0)));
        assert_eq!(
            parse_json("-Infinity"),
            Some(Value::Float(f64::NEG_INFINITY))
        );
        assert_eq!(parse_json("None"), None);
    }

    proptest::proptest! {
        #[test]
        fn no_text_can_break_the_readers(text in "\\PC{0,60}") {
            parse_json(&text);
            parse_python(&text);
        }
    }
}
