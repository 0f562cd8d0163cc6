//! Texts and conditions, right and wrong.
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

#[test]
fn a_short_expression_gives_no_value_without_bounds() {
    let many = |filter: &str, times: usize| format!("${{{{ \"a'\" {} }}}}", filter.repeat(times));
    let wide = "a".repeat(32);
    for text in [
        many(&format!("| replace(from=\"a\", to=\"{wide}\")"), 16),
        many("| addslashes", 70),
        many("| json_encode", 60),
        many("| split(pat=\"\") | join(sep=\"aaaaaaaa\")", 20),
        many(
            "| replace(from=\"\", to=\"\n\") | indent(prefix=\"      \", blank=true)",
            13,
        ),
        format!("${{{{ [{}0] }}}}", "range(end=100000), ".repeat(50)),
    ] {
        let error = resolve(&text, &scope()).unwrap_err();
        assert!(error.message.contains("too much"), "{}", error.message);
    }
    // As long as it stays small, a filter gives what it gives in tera.
    assert_eq!(
        done("${{ \"a-b\" | replace(from=\"-\", to=\"+\") | split(pat=\"+\") | join(sep=\"/\") }}"),
        json!("a/b")
    );
    assert_eq!(
        done("${{ \"a\nb\" | indent(prefix=\"> \", first=true) }}"),
        json!("> a\n> b")
    );
}

#[test]
fn a_large_param_is_not_repeated_without_bounds() {
    let scope = Scope {
        context: json!({ "params": { "large": "x".repeat(5 << 20), "n": 1 } }),
        items: Some(vec!["k".into()]),
        ..Scope::default()
    };
    let taken = |text: &str| resolve(text, &scope).map(drop);
    // What an expression does not name costs it nothing.
    for _ in 0..1_000 {
        assert_eq!(taken("${{ params.n + 1 }}"), Ok(()));
    }
    assert_eq!(taken("${{ params.large }} ${{ params.large }}"), Ok(()));
    assert!(taken("${{ params.large ~ params.large ~ params.large ~ params.large }}").is_err());
    for text in ["${{ params.large }} ", "${{ params.large ~ item.k }} "] {
        let fresh = Scope {
            budget: Budget::default(),
            ..scope.clone()
        };
        let error = resolve(&text.repeat(1_000), &fresh).unwrap_err();
        assert!(error.message.contains("too much"), "{}", error.message);
        // All expressions of a pipeline share what there is.
        assert!(resolve("${{ params.n }}", &fresh).is_err());
    }
    let item = BTreeMap::from([("k".to_owned(), json!("x".repeat(5 << 20)))]);
    let error = resolve_item(&json!("${{ item.k }}".repeat(1_000)), &item).unwrap_err();
    assert!(error.contains("too much"), "{error}");
}

#[test]
fn an_expression_sees_all_that_it_names() {
    let mut scope = scope();
    scope.context["run"] = json!({ "key": "n" });
    let nested = json!({ "deep": "x" });
    for (text, expected) in [
        (
            "${{ [params.nested.deep, params.nested] }}",
            json!(["x", nested]),
        ),
        (
            "${{ [params.nested, params.nested.deep] }}",
            json!([nested, "x"]),
        ),
        ("${{ params.list.1 + params.list.2 }}", json!(5)),
        ("${{ params.nested.absent is defined }}", json!(false)),
        ("${{ params[run.key] }}", json!(25)),
        ("${{ 1 + params[\"n\"] }}", json!(26)),
    ] {
        let given = resolve(text, &scope);
        assert_eq!(given, Ok(Resolved::Done(expected)), "{text}");
    }
}

proptest! {
    #[test]
    fn no_text_panics(text in "[ -~${}\"'a-z.|()é\\[\\]]{0,40}", inner in "[ -~]{0,30}") {
        let _ = resolve(&text, &scope());
        let _ = resolve(&format!("${{{{ {inner} }}}}"), &scope());
        let _ = eval_bool(&inner, &json!({"a": 1}));
    }
}
