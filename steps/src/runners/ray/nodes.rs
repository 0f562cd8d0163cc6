//! What the nodes of a cluster have, and what a job asks for; pure.

use flowrun_engine::pipeline::Resources;
use serde_json::Value;

use super::CPUS;

/// What is asked for and no node has.
pub(super) fn lack(want: &Resources, nodes: &[&Value]) -> Option<String> {
    let cpu = if want.cpu > 0.0 { want.cpu } else { CPUS };
    let mut asked = vec![("CPU".to_owned(), cpu)];
    asked.extend((want.gpu > 0.0).then(|| ("GPU".to_owned(), want.gpu)));
    asked.extend((want.memory > 0).then(|| ("memory".to_owned(), want.memory as f64)));
    asked.extend(want.custom.iter().map(|(name, n)| (name.clone(), *n)));
    let has = |node: &Value, name: &str| node[name].as_f64().unwrap_or_default();
    let fits = |node: &&&Value| asked.iter().all(|(name, n)| has(node, name) >= *n);
    if nodes.is_empty() || nodes.iter().any(|node| fits(&node)) {
        return None;
    }
    let most = |name: &str| nodes.iter().map(|node| has(node, name)).fold(0.0, f64::max);
    let shown = |name: &str, n: f64| match name {
        "memory" => format!("{:.1} GB of memory", n / 1e9),
        _ => format!("{n} {name}"),
    };
    let lacking = asked.iter().filter(|(name, n)| most(name) < *n);
    let lacking: Vec<String> = lacking
        .map(|(name, n)| {
            format!(
                "{} (the most that one has is {})",
                shown(name, *n),
                most(name)
            )
        })
        .collect();
    Some(match lacking.is_empty() {
        false => format!("no node has {}", lacking.join(" and ")),
        true => {
            let all: Vec<String> = asked.iter().map(|(name, n)| shown(name, *n)).collect();
            format!("no node has {} together", all.join(" and "))
        }
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_no_node_has_is_named() {
        let (small, big) = (json!({"CPU": 4.0, "memory": 8e9}), json!({"CPU": 16.0}));
        let nodes = [&small, &big];
        let want = |cpu: f64, memory: u64, gpu: f64| Resources {
            cpu,
            memory,
            gpu,
            ..Resources::default()
        };
        assert_eq!(lack(&want(16.0, 0, 0.0), &nodes), None);
        assert_eq!(lack(&want(0.0, 8_000_000_000, 0.0), &nodes), None);
        assert_eq!(lack(&want(64.0, 0, 0.0), &[]), None, "nothing is known");
        let text = lack(&want(64.0, 0, 2.0), &nodes).unwrap();
        assert_eq!(
            text,
            "no node has 64 CPU (the most that one has is 16) and 2 GPU (the most that one has is 0)"
        );
        let text = lack(&want(16.0, 8_000_000_000, 0.0), &nodes).unwrap();
        assert_eq!(text, "no node has 16 CPU and 8.0 GB of memory together");
    }
}
