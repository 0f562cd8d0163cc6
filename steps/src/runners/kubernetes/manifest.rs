//! The Job that is ordered: one pod, made once, under no rights but those of its files.

use std::collections::BTreeMap;
use std::time::Duration;

use flowrun_engine::pipeline::Resources;
use flowrun_engine::runner::JobOrder;
use serde_json::{Map, Value, json};

use super::Settings;

/// Name of the container in which the work is done.
pub(super) const CONTAINER: &str = "flowrun";
/// Label with the job's id, of its pods.
pub(super) const JOB: &str = "flowrun/job";
/// Label with the project whose runs look after the job.
pub(super) const PROJECT: &str = "flowrun/project";
/// Cores of a job that does not say how many it wants.
const CPUS: f64 = 1.0;
/// How long what a killed run left stands after its end, in seconds.
const KEPT: u64 = 24 * 60 * 60;
/// How much later than the run, which stops a job that takes too long, the cluster does so.
const LATER: Duration = Duration::from_secs(60);
/// Seconds that a process has to stop. It gives up by itself after five.
const GRACE: u64 = 30;
/// Characters of a label's value.
const LABEL: usize = 63;

/// Whose files the pods have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) user: u32,
    pub(super) group: u32,
}

/// The Job of an order.
pub(super) fn job(settings: &Settings, owner: Owner, project: &str, order: &JobOrder<'_>) -> Value {
    let labels = labels(settings, project, order);
    let mut annotations = settings.annotations.clone();
    // Labels have no room for it as it is.
    annotations.insert("flowrun/step".to_owned(), order.step.to_owned());
    let mut spec = json!({
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "ttlSecondsAfterFinished": KEPT,
        "template": {
            "metadata": {"labels": labels, "annotations": annotations},
            "spec": pod(settings, owner, order),
        },
    });
    if let Some(timeout) = order.timeout {
        spec["activeDeadlineSeconds"] = (timeout + LATER).as_secs().into();
    }
    json!({
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": order.id,
            "namespace": settings.namespace,
            "labels": labels,
            "annotations": annotations,
        },
        "spec": spec,
    })
}

fn labels(settings: &Settings, project: &str, order: &JobOrder<'_>) -> BTreeMap<String, String> {
    let mut labels = settings.labels.clone();
    let ours = [
        ("app.kubernetes.io/managed-by", "flowrun".to_owned()),
        ("flowrun/run", label(order.run)),
        ("flowrun/step", label(order.step)),
        (PROJECT, project.to_owned()),
        (JOB, order.id.to_owned()),
    ];
    labels.extend(ours.map(|(name, value)| (name.to_owned(), value)));
    labels
}

/// Text as the value of a label may be.
fn label(text: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let text = text.chars().map(|c| if fits(c) { c } else { '-' });
    let text: String = text.take(LABEL).collect();
    let ends = |c: char| !c.is_ascii_alphanumeric();
    text.trim_matches(ends).to_owned()
}

fn pod(settings: &Settings, owner: Owner, order: &JobOrder<'_>) -> Value {
    let mut pod = json!({
        "automountServiceAccountToken": false,
        "enableServiceLinks": false,
        "terminationGracePeriodSeconds": GRACE,
        "securityContext": {
            "runAsNonRoot": owner.user != 0,
            "runAsUser": owner.user,
            "runAsGroup": owner.group,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    });
    lay_over(&mut pod, &settings.pod);
    let volumes = settings.volumes.values().enumerate().map(|(n, source)| {
        let mut volume = source.clone();
        volume.insert("name".to_owned(), volume_name(n).into());
        Value::Object(volume)
    });
    pod["restartPolicy"] = "Never".into();
    pod["volumes"] = volumes.collect();
    pod["containers"] = json!([container(settings, order)]);
    pod
}

fn container(settings: &Settings, order: &JobOrder<'_>) -> Value {
    let mut container = json!({
        // Nobody has a home there, and programs write to it.
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": resources(settings, order.resources),
        "securityContext": {
            "allowPrivilegeEscalation": false,
            "capabilities": {"drop": ["ALL"]},
        },
        // What it printed is then in its status, for the error.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    });
    lay_over(&mut container, &settings.container);
    let mounts = settings.volumes.keys().enumerate();
    let mounts = mounts.map(|(n, path)| json!({"name": volume_name(n), "mountPath": path}));
    let program = std::iter::once(order.program);
    let command = program.chain(order.args.iter().map(String::as_str));
    container["name"] = CONTAINER.into();
    container["image"] = settings.image.as_str().into();
    container["command"] = command.collect();
    container["volumeMounts"] = mounts.collect();
    container
}

fn volume_name(n: usize) -> String {
    format!("volume-{n}")
}

/// What is asked for; memory and devices are limits too. Cores are none: what is idle may be used.
fn resources(settings: &Settings, want: &Resources) -> Value {
    let cpu = if want.cpu > 0.0 { want.cpu } else { CPUS };
    let mut bounded = BTreeMap::new();
    if want.memory > 0 {
        bounded.insert("memory".to_owned(), want.memory.to_string());
    }
    // Devices are whole.
    if want.gpu > 0.0 {
        bounded.insert(settings.gpu.clone(), want.gpu.ceil().to_string());
    }
    let custom = want.custom.iter();
    bounded.extend(custom.map(|(name, n)| (name.clone(), n.ceil().to_string())));
    let mut requests = bounded.clone();
    requests.insert("cpu".to_owned(), format!("{}m", (cpu * 1000.0).ceil()));
    match bounded.is_empty() {
        true => json!({"requests": requests}),
        false => json!({"requests": requests, "limits": bounded}),
    }
}

/// Puts fields into an object, and into its objects; what is there gives way.
fn lay_over(under: &mut Value, over: &Map<String, Value>) {
    for (name, value) in over {
        match value {
            Value::Object(inner) if under[name].is_object() => lay_over(&mut under[name], inner),
            _ => under[name] = value.clone(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::*;

    const OWNER: Owner = Owner {
        user: 10001,
        group: 10002,
    };

    fn settings(more: &Value) -> Settings {
        let mut all = json!({
            "namespace": "ml",
            "image": "registry.example/flowrun:1",
            "volumes": {"/mnt/flowrun": {"persistentVolumeClaim": {"claimName": "flowrun"}}},
        });
        lay_over(&mut all, more.as_object().unwrap());
        serde_json::from_value(all).unwrap()
    }

    /// The Job of a step with these wishes.
    fn ordered(settings: &Settings, resources: &Resources, timeout: Option<Duration>) -> Value {
        let order = JobOrder {
            id: "flowrun-0123456789abcdef0123",
            step: "evaluate[epoch-2]",
            run: "20260101T000000Z-1",
            timeout,
            program: "/usr/local/bin/flowrun",
            args: ["step", "exec", "--job", "/mnt/flowrun/jobs/k/1"]
                .map(str::to_owned)
                .to_vec(),
            folder: Some(Path::new("/mnt/flowrun/jobs/k/1")),
            variables: &[],
            resources,
        };
        job(settings, OWNER, "0123", &order)
    }

    /// One that asks for everything that can be asked for.
    fn full() -> Value {
        let more = json!({
            "volumes": {"/home/data": {"nfs": {"server": "files.example", "path": "/data"}}},
            "labels": {"kueue.x-k8s.io/queue-name": "q"},
            "annotations": {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
            "gpu": "amd.com/gpu",
            "pod": {
                "serviceAccountName": "worker",
                "nodeSelector": {"disk": "ssd"},
                "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
                "imagePullSecrets": [{"name": "registry"}],
                "securityContext": {"fsGroup": 10002},
            },
            "container": {
                "envFrom": [{"secretRef": {"name": "keys"}}],
                "securityContext": {"readOnlyRootFilesystem": true},
            },
        });
        let resources = Resources {
            cpu: 1.5,
            memory: 1 << 30,
            gpu: 0.5,
            custom: [("example.com/tpu".to_owned(), 2.0)].into(),
        };
        let hour = Some(Duration::from_secs(3600));
        ordered(&settings(&more), &resources, hour)
    }

    #[test]
    fn a_job_is_one_pod_with_one_try_and_no_rights() {
        let job = ordered(&settings(&json!({})), &Resources::default(), None);
        let spec = &job["spec"];
        assert_eq!(
            (&spec["backoffLimit"], &spec["completions"]),
            (&json!(0), &json!(1))
        );
        assert_eq!(spec["ttlSecondsAfterFinished"], 86400);
        assert!(spec.get("activeDeadlineSeconds").is_none());
        let pod = &spec["template"]["spec"];
        assert_eq!(pod["restartPolicy"], "Never");
        assert_eq!(pod["automountServiceAccountToken"], false);
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["runAsUser"], 10001);
        let container = &pod["containers"][0];
        assert_eq!(container["command"][0], "/usr/local/bin/flowrun");
        assert_eq!(container["command"][4], "/mnt/flowrun/jobs/k/1");
        assert_eq!(
            container["resources"],
            json!({"requests": {"cpu": "1000m"}})
        );
        assert_eq!(
            container["volumeMounts"],
            json!([{"name": "volume-0", "mountPath": "/mnt/flowrun"}])
        );
    }

    #[test]
    fn a_job_says_whose_it_is_and_what_it_needs() {
        let job = full();
        let labels = &job["metadata"]["labels"];
        assert_eq!(labels["flowrun/step"], "evaluate-epoch-2");
        assert_eq!(labels["flowrun/run"], "20260101T000000Z-1");
        assert_eq!(labels["kueue.x-k8s.io/queue-name"], "q");
        let template = &job["spec"]["template"];
        assert_eq!(template["metadata"]["labels"], *labels);
        let annotations = &template["metadata"]["annotations"];
        assert_eq!(annotations["flowrun/step"], "evaluate[epoch-2]");
        assert_eq!(job["spec"]["activeDeadlineSeconds"], 3660);
        let pod = &template["spec"];
        assert_eq!(pod["nodeSelector"]["disk"], "ssd");
        assert_eq!(pod["securityContext"]["fsGroup"], 10002);
        assert_eq!(pod["securityContext"]["runAsUser"], 10001, "it is kept");
        let resources = &pod["containers"][0]["resources"];
        let limits = json!({"memory": "1073741824", "amd.com/gpu": "1", "example.com/tpu": "2"});
        assert_eq!(resources["limits"], limits);
        assert_eq!(resources["requests"]["cpu"], "1500m");
        assert_eq!(resources["requests"]["amd.com/gpu"], "1");
    }

    #[test]
    fn the_value_of_a_label_is_one() {
        assert_eq!(label("evaluate[epoch-2]"), "evaluate-epoch-2");
        assert_eq!(label("clean/__x__"), "clean-__x");
        assert_eq!(label("[]"), "");
        assert_eq!(label(&"ä".repeat(99)), "");
        assert_eq!(label(&"a".repeat(99)).len(), LABEL);
    }

    #[test]
    fn jobs_fit_the_schemas_of_kubernetes() {
        let Some(validator) = std::env::var_os("FLOWRUN_KUBERNETES_VALIDATE") else {
            let why = "FLOWRUN_KUBERNETES_VALIDATE names no `kubernetes-validate`";
            crate::required::skip("kubernetes-validate", why);
            return;
        };
        let folder = tempfile::tempdir().unwrap();
        let small = ordered(&settings(&json!({})), &Resources::default(), None);
        let mut wrong = small.clone();
        wrong["spec"]["template"]["spec"]["nodSelector"] = json!({});
        for (job, good) in [(small, true), (full(), true), (wrong, false)] {
            let file = folder.path().join("job.yaml");
            std::fs::write(&file, serde_yaml::to_string(&job).unwrap()).unwrap();
            let mut command = Command::new(&validator);
            let output = command
                .args(["-k", "1.31", "--strict"])
                .arg(&file)
                .output()
                .unwrap();
            assert_eq!(output.status.success(), good, "{output:?}\n{job:#}");
        }
    }
}
