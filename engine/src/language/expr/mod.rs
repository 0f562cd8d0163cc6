//! `${{ expr }}`: expressions inside the text of a pipeline.
//!
//! An expression is one of tera's, over a context of JSON values. It sees no
//! environment, clock, file or random number, so it gives the same at any time.
//! Knows no places; a mistake is told by where it stands in the text.
//!
//! Invariant: text is evaluated at most once. While a value waits for `item`, what
//! is already final in it is kept escaped (`$${{`), and [`resolve_item`] takes that out.

mod run_time;

pub use run_time::{eval_bool, resolve_item};

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;

use serde_json::Value;

use super::suggest;
use super::token::{Reference, Segment, Token, references, tokens};

/// What opens an expression.
const OPEN: &str = "${{";
/// What stands for a literal [`OPEN`].
const ESCAPED: &str = "$${{";

/// A mistake in an expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExprError {
    /// How many expressions come before it in the text.
    pub(crate) skip: usize,
    /// The piece of the text that is wrong, as written.
    pub(crate) snippet: String,
    /// Stable name of the kind of mistake.
    pub(crate) code: &'static str,
    /// What is wrong.
    pub(crate) message: String,
    /// What to do about it.
    pub(crate) help: Option<String>,
}

impl ExprError {
    fn new(snippet: &str, code: &'static str, message: impl Into<String>) -> Self {
        let snippet = snippet.to_owned();
        Self {
            skip: 0,
            snippet,
            code,
            message: message.into(),
            help: None,
        }
    }

    fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// A piece of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part<'a> {
    /// Stands for itself.
    Text(&'a str),
    /// A literal `${{`.
    Escape,
    /// What stands between `${{` and `}}`, trimmed.
    Expr(&'a str),
}

/// True when the text holds an expression (or the start of one).
pub(crate) fn has_expression(text: &str) -> bool {
    text.match_indices(OPEN)
        .any(|(at, _)| !text[..at].ends_with('$'))
}

/// Splits a text into what stands for itself and expressions.
fn split(text: &str) -> Result<Vec<Part<'_>>, ExprError> {
    let mut parts = Vec::new();
    let mut rest = text;
    let mut count = 0;
    while let Some(at) = rest.find(OPEN) {
        if rest[..at].ends_with('$') {
            parts.push(Part::Text(&rest[..at - 1]));
            parts.push(Part::Escape);
            rest = &rest[at + OPEN.len()..];
            continue;
        }
        parts.push(Part::Text(&rest[..at]));
        let body = &rest[at + OPEN.len()..];
        let Some(end) = end_of(body) else {
            let error = ExprError::new(OPEN, "expression", "`${{` without `}}`")
                .help("close it with `}}`, or write `$${{` for the characters themselves");
            return Err(ExprError {
                skip: count,
                ..error
            });
        };
        parts.push(Part::Expr(body[..end].trim()));
        count += 1;
        rest = &body[end + 2..];
    }
    parts.push(Part::Text(rest));
    parts.retain(|p| *p != Part::Text(""));
    Ok(parts)
}

/// Where `}}` stands in `body`, outside of quotes.
fn end_of(body: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in body.char_indices() {
        match (quote, c) {
            (Some(q), c) if q == c => quote = None,
            (None, '"' | '\'' | '`') => quote = Some(c),
            (None, '}') if body[at..].starts_with("}}") => return Some(at),
            _ => {}
        }
    }
    None
}

/// What an expression may refer to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    /// `params`, `run`, `models`: what is known before the run.
    pub(crate) context: Value,
    /// The `foreach` variables, when the text belongs to a step that has some.
    pub(crate) items: Option<Vec<String>>,
    /// The params of the step definition around that differ from item to item, each with the
    /// variable of `item` that holds it.
    pub(crate) deferred: BTreeMap<String, String>,
    /// The text belongs to a definition whose use has a `foreach`: it is read once more, per item.
    pub(crate) walked: bool,
    /// The text is read once more when the item is known, if it asks for it.
    pub(crate) may_wait: bool,
}

impl Scope {
    /// The variable of `item` that holds what is referred to, when that is a deferred param.
    fn variable(&self, reference: &Reference<'_>) -> Option<&str> {
        match reference.segments.get(1) {
            Some(Segment::Key(name)) if reference.root() == "params" => {
                self.deferred.get(name).map(String::as_str)
            }
            _ => None,
        }
    }

    /// `name` is a variable that stands for a deferred param.
    fn is_deferred(&self, name: &str) -> bool {
        self.deferred.values().any(|variable| variable == name)
    }
}

/// What became of a text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Resolved {
    /// It is final; a single expression keeps its type.
    Done(Value),
    /// It waits for `item`; everything else in it is filled in.
    Waits(String),
}

/// Fills in what is known of a text.
///
/// # Errors
/// The first mistake in it.
pub(crate) fn resolve(text: &str, scope: &Scope) -> Result<Resolved, ExprError> {
    if !text.contains(OPEN) {
        return Ok(Resolved::Done(Value::String(text.to_owned())));
    }
    let parts = split(text)?;
    let mut waits = false;
    let mut count = 0;
    for part in &parts {
        if let Part::Expr(source) = part {
            let checked = check(source, scope).map_err(|e| ExprError { skip: count, ..e })?;
            waits |= checked;
            count += 1;
        }
    }
    if let ([Part::Expr(source)], false) = (parts.as_slice(), waits) {
        return evaluate(source, &scope.context).map(Resolved::Done);
    }
    let mut out = String::new();
    let mut skip = 0;
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Escape => out.push_str(if waits { ESCAPED } else { OPEN }),
            Part::Expr(source) => {
                let at = |e| ExprError { skip, ..e };
                let renamed = renamed(source, scope).map_err(at)?;
                if refers_to_item(&renamed) {
                    let filled = fill(&renamed, &scope.context).map_err(at)?;
                    out.push_str(&format!("${{{{ {filled} }}}}"));
                } else {
                    let value = evaluate(source, &scope.context).map_err(at)?;
                    let text = as_text(&value, source).map_err(at)?;
                    out.push_str(&if waits { escape(&text) } else { text });
                }
                skip += 1;
            }
        }
    }
    Ok(if waits {
        Resolved::Waits(out)
    } else {
        Resolved::Done(Value::String(out))
    })
}

/// The text with every literal `${{` escaped.
pub(crate) fn escape(text: &str) -> String {
    text.replace(OPEN, ESCAPED)
}

/// The value with every text in it changed.
fn each_text(value: Value, change: fn(&str) -> String) -> Value {
    match value {
        Value::String(text) => Value::String(change(&text)),
        Value::Array(items) => items.into_iter().map(|v| each_text(v, change)).collect(),
        Value::Object(map) => map
            .into_iter()
            .map(|(k, v)| (k, each_text(v, change)))
            .collect(),
        other => other,
    }
}

/// The value with every literal `${{` in it escaped, so that [`resolve_item`] gives it back.
pub(crate) fn escaped(value: Value) -> Value {
    each_text(value, escape)
}

/// What [`escaped`] was made from.
pub(crate) fn unescaped(value: Value) -> Value {
    each_text(value, |text| text.replace(ESCAPED, OPEN))
}

/// True when some text in the value holds an expression.
pub(crate) fn holds_expression(value: &Value) -> bool {
    match value {
        Value::String(text) => has_expression(text),
        Value::Array(items) => items.iter().any(holds_expression),
        Value::Object(map) => map.values().any(holds_expression),
        _ => false,
    }
}

/// The expression of `when` or `expect`: the text, or what stands inside its `${{ }}`.
///
/// # Errors
/// Text around the expression, or a mistake in it.
pub(crate) fn condition<'a>(text: &'a str, scope: &Scope) -> Result<&'a str, ExprError> {
    let source = match split(text)?.as_slice() {
        [Part::Expr(source)] => source,
        [Part::Text(_)] => text.trim(),
        _ => {
            let message = "a condition is one expression";
            return Err(ExprError::new(text, "expression", message)
                .help("write the whole condition inside one `${{ … }}`"));
        }
    };
    check(source, scope)?;
    Ok(source)
}

/// A condition with all that is known filled in: `true`, `false`, or one that asks for `item`.
///
/// # Errors
/// A mistake in it, or a value that is neither true nor false.
pub(crate) fn close_condition(text: &str, scope: &Scope) -> Result<String, ExprError> {
    let source = condition(text, scope)?;
    let renamed = renamed(source, scope)?;
    if refers_to_item(&renamed) {
        return fill(&renamed, &scope.context);
    }
    match evaluate(source, &scope.context)? {
        Value::Bool(holds) => Ok(holds.to_string()),
        other => {
            let what = super::node::describe(&other);
            let message = format!("`{source}` is {what}, not true or false");
            Err(ExprError::new(source, "expression", message))
        }
    }
}

/// Checks names and form of an expression; true when it refers to `item`.
fn check(source: &str, scope: &Scope) -> Result<bool, ExprError> {
    let tokens = tokens(source)?;
    if tokens.is_empty() {
        return Err(ExprError::new("", "expression", "an empty expression"));
    }
    let mut item = false;
    for reference in references(source, &tokens)? {
        if reference.root() == "item" {
            item = true;
            check_item(&reference, scope)?;
        } else if scope.variable(&reference).is_some() {
            item = true;
            check_deferred(&reference, scope)?;
        } else if reference.segments.len() == 1 && reference.root() == "params" {
            check_params(&reference, scope)?;
            check_reference(&reference, &scope.context)?;
        } else {
            check_reference(&reference, &scope.context)?;
        }
    }
    parse(source)?;
    Ok(item)
}

/// A param that differs from item to item is not known everywhere.
fn check_deferred(reference: &Reference<'_>, scope: &Scope) -> Result<(), ExprError> {
    if scope.may_wait {
        return Ok(());
    }
    let message = format!(
        "`{}` depends on the item: it is known only in `with`, `env`, `run`, `publish`, `when` and the lists of `foreach`",
        reference.prefix(2)
    );
    Err(ExprError::new(reference.text, "unknown-variable", message))
}

/// `params` as a whole.
fn check_params(reference: &Reference<'_>, scope: &Scope) -> Result<(), ExprError> {
    let Some(name) = scope.deferred.keys().next() else {
        return Ok(());
    };
    let message = format!("`params` as a whole is not known here: `{name}` depends on the item");
    let error = ExprError::new(reference.text, "expression", message);
    Err(error.help("name the params one by one"))
}

fn check_item(reference: &Reference<'_>, scope: &Scope) -> Result<(), ExprError> {
    if let Some(Segment::Key(name)) = reference.segments.get(1)
        && scope.is_deferred(name)
    {
        return Ok(());
    }
    let Some(items) = &scope.items else {
        let message = "`item` is known only in `in`, `with`, `env`, `run`, `publish` and `when` of a `foreach` step";
        return Err(ExprError::new(reference.text, "unknown-variable", message));
    };
    match reference.segments.get(1) {
        Some(Segment::Key(name)) if !items.iter().any(|i| i == name) => {
            let message = format!("`foreach` has no variable `{name}`");
            let help = suggest::help(name, "variables", items.iter().map(String::as_str));
            Err(ExprError {
                help,
                ..ExprError::new(reference.text, "unknown-variable", message)
            })
        }
        Some(_) => Ok(()),
        None => {
            let error = ExprError::new(reference.text, "expression", "`item` needs a variable");
            let first = items.first().map_or("x", String::as_str);
            Err(error.help(format!("write for example `item.{first}`")))
        }
    }
}

/// Walks the reference through the context as far as it is known.
fn check_reference(reference: &Reference<'_>, context: &Value) -> Result<(), ExprError> {
    let mut value = context;
    for (depth, segment) in reference.segments.iter().enumerate() {
        let Segment::Key(name) = segment else {
            return Ok(());
        };
        let next = match value {
            Value::Object(map) => map.get(name),
            Value::Array(list) => name.parse::<usize>().ok().and_then(|i| list.get(i)),
            _ => None,
        };
        match next {
            Some(next) => value = next,
            None if reference.may_be_absent && depth > 0 => return Ok(()),
            None => return Err(unknown(reference, depth, name, value)),
        }
    }
    Ok(())
}

fn unknown(reference: &Reference<'_>, depth: usize, name: &str, around: &Value) -> ExprError {
    let place = reference.prefix(depth);
    let message = match (depth, place.as_str()) {
        (0, _) => format!("there is no `{name}` here"),
        (1, "params") => format!("unknown param `{name}`"),
        (1, "models") => format!("unknown model `{name}`"),
        _ => format!("`{place}` has no `{name}`"),
    };
    let keys = around
        .as_object()
        .map(|m| m.keys().map(String::as_str).collect::<Vec<_>>());
    let keys = keys.unwrap_or_default();
    let help = if depth == 0 && reference.segments.len() == 1 && params_hold(around, name) {
        Some(format!("did you mean `params.{name}`?"))
    } else {
        suggest::help(name, "known here", keys)
    };
    let code = if place == "params" {
        "unknown-param"
    } else {
        "unknown-variable"
    };
    ExprError {
        help,
        ..ExprError::new(reference.text, code, message)
    }
}

fn params_hold(context: &Value, name: &str) -> bool {
    context.get("params").and_then(|p| p.get(name)).is_some()
}

fn refers_to_item(source: &str) -> bool {
    let found = tokens(source).and_then(|tokens| {
        Ok(references(source, &tokens)?
            .iter()
            .any(|reference| reference.root() == "item"))
    });
    found.unwrap_or(false)
}

/// The expression with `item.…` in place of every deferred param.
fn renamed<'a>(source: &'a str, scope: &Scope) -> Result<Cow<'a, str>, ExprError> {
    if scope.deferred.is_empty() {
        return Ok(Cow::Borrowed(source));
    }
    let tokens = tokens(source)?;
    let mut out = String::new();
    let mut from = 0;
    for reference in references(source, &tokens)? {
        let Some(variable) = scope.variable(&reference) else {
            continue;
        };
        out.push_str(&source[from..reference.start]);
        out.push_str("item.");
        out.push_str(variable);
        from = reference.start + second_segment_end(&reference);
    }
    out.push_str(&source[from..]);
    Ok(Cow::Owned(out))
}

/// How far the text of a reference goes to the end of its second segment: `.n` or `["n"]`.
fn second_segment_end(reference: &Reference<'_>) -> usize {
    let root = reference.root().len();
    let tail = reference.text.get(root..).unwrap_or_default();
    let length = match reference.segments.get(1) {
        Some(Segment::Key(name)) if tail.starts_with('.') => 1 + name.len(),
        _ => tail.find(']').map_or(tail.len(), |at| at + 1),
    };
    root + length
}

/// The expression with every known reference replaced by its value, so that only `item` is left.
fn fill(source: &str, context: &Value) -> Result<String, ExprError> {
    let tokens = tokens(source)?;
    let mut out = String::new();
    let mut from = 0;
    for reference in references(source, &tokens)? {
        if reference.root() == "item" {
            continue;
        }
        let mixed = |why: &str| {
            let message = format!("`{}` cannot be used together with `item`", reference.text);
            ExprError::new(reference.text, "expression", message).help(why)
        };
        let value = lookup(&reference, context)
            .ok_or_else(|| mixed("its place depends on the item; use a fixed name"))?;
        let literal =
            literal(value).ok_or_else(|| mixed("use a number, text, or a list of them"))?;
        out.push_str(&source[from..reference.start]);
        out.push_str(&literal);
        from = reference.start + reference.text.len();
    }
    out.push_str(&source[from..]);
    Ok(out)
}

/// The value of a reference that has only fixed names.
fn lookup<'a>(reference: &Reference<'_>, context: &'a Value) -> Option<&'a Value> {
    reference
        .segments
        .iter()
        .try_fold(context, |value, segment| match (segment, value) {
            (Segment::Key(name), Value::Object(map)) => map.get(name),
            (Segment::Key(name), Value::Array(list)) => list.get(name.parse::<usize>().ok()?),
            _ => None,
        })
}

/// The value as an expression.
fn literal(value: &Value) -> Option<String> {
    match value {
        Value::Bool(b) => Some(b.to_string()),
        Value::Number(n) => match n.as_i64() {
            Some(n) => Some(n.to_string()),
            // Never with an exponent, which expressions cannot hold.
            None => n
                .as_f64()
                .map(|f| format!("{f:?}"))
                .filter(|t| !t.contains('e')),
        },
        Value::String(text) => {
            let quote = ['"', '\'', '`'].into_iter().find(|q| !text.contains(*q))?;
            Some(format!("{quote}{text}{quote}"))
        }
        Value::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(literal).collect();
            Some(format!("[{}]", items?.join(", ")))
        }
        Value::Null | Value::Object(_) => None,
    }
}

/// A value within a longer text.
fn as_text(value: &Value, source: &str) -> Result<String, ExprError> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Bool(_) | Value::Number(_) => Ok(value.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => {
            let what = super::node::describe(value);
            let message = format!("`{source}` is {what}, which cannot stand inside a text");
            Err(ExprError::new(source, "expression", message))
        }
    }
}

/// Most numbers of a `range`.
const MAX_RANGE: i64 = 100_000;

/// tera with a `range` that ends.
fn own_words() -> tera::Tera {
    let mut tera = tera::Tera::default();
    tera.register_function("range", bounded_range);
    tera
}

fn bounded_range(args: &std::collections::HashMap<String, Value>) -> tera::Result<Value> {
    let number = |name: &str, default: Option<i64>| {
        let given = args.get(name).map(|v| {
            v.as_i64()
                .ok_or_else(|| tera::Error::msg(format!("`{name}` of `range` is no whole number")))
        });
        given
            .or(default.map(Ok))
            .unwrap_or_else(|| Err(tera::Error::msg(format!("`range` needs `{name}`"))))
    };
    let (start, end) = (number("start", Some(0))?, number("end", None)?);
    let step = number("step_by", Some(1))?;
    if step < 1 || end.saturating_sub(start) / step.max(1) > MAX_RANGE {
        let text =
            format!("`range` gives at most {MAX_RANGE} numbers, with a `step_by` of 1 or more");
        return Err(tera::Error::msg(text));
    }
    let mut all = Vec::new();
    let mut at = start;
    while at < end {
        all.push(Value::from(at));
        at = at.saturating_add(step);
    }
    Ok(Value::from(all))
}

thread_local! {
    /// Making one registers all filters, so it is kept.
    static ENGINE: RefCell<tera::Tera> = RefCell::new(own_words());
}

/// Checks that tera can read the expression.
pub(crate) fn parse(source: &str) -> Result<(), ExprError> {
    if tokens(source)?.iter().all(|t| {
        matches!(
            t,
            Token {
                kind: super::token::Kind::Word,
                ..
            }
        )
    }) {
        return Ok(());
    }
    let template = template(source);
    let parsed = tera::Template::new("expression", None, &template);
    parsed.map(|_| ()).map_err(|_| {
        ExprError::new(
            source,
            "expression",
            format!("`{source}` is not a valid expression"),
        )
        .help("expressions are tera's: `params.n * 2`, `params.a ~ \"-b\"`, `params.list | length`")
    })
}

fn template(source: &str) -> String {
    format!("{{% set flowrun_value = {source} %}}{{{{ flowrun_value | json_encode }}}}")
}

/// The value of an expression.
fn evaluate(source: &str, context: &Value) -> Result<Value, ExprError> {
    let wrong = |message: String| ExprError::new(source, "expression", message);
    let tokens = tokens(source)?;
    if let [reference] = references(source, &tokens)?.as_slice()
        && reference.text == source
    {
        let value = lookup(reference, context).cloned();
        return value.ok_or_else(|| wrong(format!("`{source}` has no value")));
    }
    let context = tera::Context::from_value(context.clone()).map_err(|e| wrong(e.to_string()))?;
    let rendered = ENGINE.with_borrow_mut(|tera| tera.render_str(&template(source), &context));
    let text = rendered.map_err(|e| wrong(format!("`{source}` fails: {}", root_cause(&e))))?;
    serde_json::from_str(&text).map_err(|_| wrong(format!("`{source}` has no value")))
}

/// The innermost of a chain of errors: the outer ones speak of templates.
fn root_cause(error: &tera::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use proptest::prelude::*;

    fn scope() -> Scope {
        Scope {
            context: json!({
                "params": {"n": 25, "lr": 0.5, "name": "a\"b", "on": true, "list": [1, 2, 3],
                           "nested": {"deep": "x"}, "none": null, "big": u64::MAX, "neg": -3},
                "models": {"oracle": {"model": "m"}},
                "run": {"name": "p"},
            }),
            ..Scope::default()
        }
    }

    fn done(text: &str) -> Value {
        match resolve(text, &scope()) {
            Ok(Resolved::Done(value)) => value,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    #[allow(clippy::approx_constant)]
    fn a_single_expression_keeps_its_type() {
        assert_eq!(done("${{ params.n }}"), json!(25));
        assert_eq!(done("${{params.list}}"), json!([1, 2, 3]));
        assert_eq!(done("${{ params.nested }}"), json!({"deep": "x"}));
        assert_eq!(done("${{ params.nested.deep }}"), json!("x"));
        assert_eq!(done("${{ params[\"nested\"][\"deep\"] }}"), json!("x"));
        assert_eq!(done("${{ params.list.1 }}"), json!(2));
        assert_eq!(done("${{ params.none }}"), Value::Null);
        assert_eq!(done("${{ params.big }}"), json!(u64::MAX));
        assert_eq!(done("${{ params.n * 2 + 1 }}"), json!(51));
        assert_eq!(done("${{ (params.n + 1) * 2 }}"), json!(52));
        assert_eq!(done("${{ params.lr / 2 }}"), json!(0.25));
        assert_eq!(done("${{ params.n > 3 and params.on }}"), json!(true));
        assert_eq!(done("${{ not params.on }}"), json!(false));
        assert_eq!(done("${{ run.name ~ \"-\" ~ params.n }}"), json!("p-25"));
        assert_eq!(done("${{ params.list | length }}"), json!(3));
        assert_eq!(
            done("${{ params.list | join(sep=\"}}\") }}"),
            json!("1}}2}}3")
        );
        assert_eq!(done("${{ models.oracle.model | upper }}"), json!("M"));
        assert_eq!(done("${{ params.missing | default(value=4) }}"), json!(4));
        assert_eq!(done("${{ params.missing is defined }}"), json!(false));
        assert_eq!(done("${{ 2 in params.list }}"), json!(true));
        assert_eq!(done("${{ [1, params.n] }}"), json!([1, 25]));
        assert_eq!(done("${{ \"text\" }}"), json!("text"));
        assert_eq!(done("${{ 7 }}"), json!(7));
        assert_eq!(done("${{ true }}"), json!(true));
    }

    #[test]
    fn text_around_makes_text() {
        assert_eq!(
            done("n=${{ params.n }}, ${{ params.on }}"),
            json!("n=25, true")
        );
        assert_eq!(done("plain"), json!("plain"));
        assert_eq!(done("$${{ params.n }}"), json!("${{ params.n }}"));
        assert_eq!(
            done("cost $${{ x }} and ${{ params.n }}"),
            json!("cost ${{ x }} and 25")
        );
        assert!(resolve("a ${{ params.list }}", &scope()).is_err());
    }

    #[test]
    fn mistakes_are_told() {
        let error = |text: &str| resolve(text, &scope()).unwrap_err();
        let e = error("${{ params.m }}");
        assert_eq!(
            (e.message.as_str(), e.snippet.as_str()),
            ("unknown param `m`", "params.m")
        );
        assert_eq!(
            error("${{ parms.n }}").help.as_deref(),
            Some("did you mean `params`?")
        );
        assert_eq!(
            error("${{ n }}").help.as_deref(),
            Some("did you mean `params.n`?")
        );
        assert!(
            error("${{ params.n + }}")
                .message
                .contains("not a valid expression")
        );
        assert!(error("${{ params.n").message.contains("without"));
        assert!(error("${{ }}").message.contains("empty"));
        assert!(error("${{ item.x }}").message.contains("foreach"));
        assert!(
            error("${{ get_env(name=\"HOME\") }}")
                .message
                .contains("get_env")
        );
        assert!(
            error("${{ 1 %}{% for x in y }}")
                .message
                .contains("expression")
        );
        assert_eq!(error("${{ params.n }} ${{ params.q }}").skip, 1);
        assert!(error("${{ params.n | nope }}").message.contains("nope"));
    }

    #[test]
    fn item_waits_and_the_rest_is_filled_in() {
        let scope = Scope {
            items: Some(vec!["x".into()]),
            ..scope()
        };
        let waits = |text: &str| match resolve(text, &scope).unwrap() {
            Resolved::Waits(text) => text,
            Resolved::Done(value) => panic!("{value}"),
        };
        let item = BTreeMap::from([("x".to_owned(), json!(2))]);
        let full = |text: &str| resolve_item(&json!(waits(text)), &item).unwrap();
        assert_eq!(waits("${{ item.x + params.n }}"), "${{ item.x + 25 }}");
        assert_eq!(full("${{ item.x + params.n }}"), json!(27));
        assert_eq!(full("${{ item.x - params.neg }}"), json!(5));
        assert_eq!(full("${{ item.x }}"), json!(2));
        assert_eq!(
            full("$${{ ${{ item.x }} ${{ params.name }}"),
            json!("${{ 2 a\"b")
        );
        assert_eq!(full("${{ params.name ~ item.x }}"), json!("a\"b2"));
        assert_eq!(full("${{ item.x in params.list }}"), json!(true));
        assert!(resolve("${{ item.y }}", &scope).unwrap_err().help.is_some());
        assert!(resolve("${{ item }}", &scope).is_err());
        assert!(resolve("${{ item.x ~ params.nested }}", &scope).is_err());
    }

    #[test]
    fn a_param_that_differs_from_item_to_item_waits_with_it() {
        let deferred = [("k", "_0_k"), ("a-b", "_0_1")];
        let deferred = deferred.map(|(name, variable)| (name.to_owned(), variable.to_owned()));
        let scope = Scope {
            deferred: deferred.into(),
            walked: true,
            may_wait: true,
            ..scope()
        };
        let waits = |text: &str| match resolve(text, &scope).unwrap() {
            Resolved::Waits(text) => text,
            Resolved::Done(value) => panic!("{value}"),
        };
        assert_eq!(waits("${{ params.k }}"), "${{ item._0_k }}");
        assert_eq!(waits("${{ params[\"a-b\"].x }}"), "${{ item._0_1.x }}");
        assert_eq!(
            waits("${{ params.k * params.n + params.k }} $${{ params.k }}"),
            "${{ item._0_k * 25 + item._0_k }} $${{ params.k }}"
        );
        let item = BTreeMap::from([
            ("_0_k".to_owned(), json!(2)),
            ("_0_1".to_owned(), json!({"x": "y"})),
        ]);
        let full = |text: &str| resolve_item(&json!(waits(text)), &item).unwrap();
        assert_eq!(full("${{ params.k * params.n }}"), json!(50));
        assert_eq!(
            full("${{ params[\"a-b\"].x }}-${{ params.k }}"),
            json!("y-2")
        );
        assert_eq!(
            close_condition("params.k > params.n", &scope),
            Ok("item._0_k > 25".to_owned())
        );
        assert_eq!(
            resolve("${{ params.n }}", &scope),
            Ok(Resolved::Done(json!(25)))
        );
        // Closed once, it can be read again.
        assert_eq!(condition("item._0_k > 25", &scope), Ok("item._0_k > 25"));
        let message = |text: &str, scope: &Scope| resolve(text, scope).unwrap_err().message;
        assert!(message("${{ params | length }}", &scope).contains("`a-b` depends on the item"));
        assert!(message("${{ item.k }}", &scope).contains("foreach"));
        let fixed = Scope {
            may_wait: false,
            ..scope.clone()
        };
        assert!(message("${{ params.k }}", &fixed).contains("`params.k` depends on the item"));
    }

    #[test]
    fn escaping_whole_values_goes_there_and_back() {
        let value = json!({"a": ["${{ x }}", 1], "b": {"c": "$${{"}});
        let there = escaped(value.clone());
        assert!(!holds_expression(&there), "{there}");
        assert!(holds_expression(&value));
        assert_eq!(unescaped(there), value);
    }

    #[test]
    fn without_an_item_nothing_is_touched() {
        let value = json!({"a": "${{ item.x }}"});
        assert_eq!(resolve_item(&value, &BTreeMap::new()).unwrap(), value);
    }

    #[test]
    fn conditions() {
        let metrics = json!({"accuracy": 0.81, "rows": 10});
        assert_eq!(eval_bool("accuracy >= 0.8", &metrics), Ok(true));
        assert_eq!(eval_bool("${{ accuracy >= 0.9 }}", &metrics), Ok(false));
        assert_eq!(
            eval_bool("accuracy >= 0.8 and rows > 10", &metrics),
            Ok(false)
        );
        assert!(
            eval_bool("acuracy >= 0.8", &metrics)
                .unwrap_err()
                .contains("`accuracy`")
        );
        assert!(
            eval_bool("rows", &metrics)
                .unwrap_err()
                .contains("not true or false")
        );
    }

    #[test]
    fn deep_or_long_expressions_end_soon() {
        for depth in [1, 8, 30, 10_000] {
            let text = format!("${{{{ {}1{} }}}}", "(".repeat(depth), ")".repeat(depth));
            let _ = resolve(&text, &scope());
            let text = format!("${{{{ {}1 }}}}", "(".repeat(depth));
            let _ = resolve(&text, &scope());
            let text = format!("${{{{ {}1{} }}}}", "[".repeat(depth), "]".repeat(depth));
            let _ = resolve(&text, &scope());
        }
        assert!(resolve(&format!("${{{{ {}true }}}}", "not ".repeat(5000)), &scope()).is_err());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~${}\"'a-z.|()é\\[\\]]{0,40}", inner in "[ -~]{0,30}") {
            let _ = resolve(&text, &scope());
            let _ = resolve(&format!("${{{{ {inner} }}}}"), &scope());
            let _ = eval_bool(&inner, &json!({"a": 1}));
        }

        #[test]
        fn escaped_text_comes_back(text in "[a-z${} ]{0,30}") {
            let escaped = escape(&text);
            // A `$` right before an escape would read as part of it.
            prop_assume!(!text.contains("$${{"));
            let item = BTreeMap::from([("x".to_owned(), json!(1))]);
            prop_assert_eq!(resolve_item(&json!(escaped), &item), Ok(json!(text)));
        }
    }
}
