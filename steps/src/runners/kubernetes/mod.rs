//! `kubernetes`: Jobs of a Kubernetes cluster, through the user's `kubectl`. The files of a job
//! lie on a volume that the pods and this machine both have.
//!
//! | file | does |
//! |---|---|
//! | this one | settings; order, look, stop, forget |
//! | `manifest` | the Job that is ordered |
//! | `outcome` | what a Job and its pod say; pure |
//! | `kubectl` | raw requests |
//!
//! All jobs of a project are looked at together, so that many cost no more calls than one.
//! What was run on a cluster: `docs/connected.md`.

mod kubectl;
mod manifest;
mod outcome;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use flowrun_cache::Digest;
use flowrun_engine::runner::{JobEnd, JobError, JobKind, JobOrder, JobState, JobSystem};
use flowrun_engine::step::{StepError, World};
use nix::unistd::{getegid, geteuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use self::kubectl::{CallError, Kubectl};
use self::manifest::Owner;
use self::outcome::Told;
use crate::schema_of;

/// Wait between two looks at the jobs; longer where a look takes long.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// At most one part in so many of the time is spent on looks.
const SHARE: u32 = 5;
/// Wait between two questions for the events of what waits without a reason.
const EVENTS_EVERY: Duration = Duration::from_secs(5);
/// Hex digits of the project's label.
const PROJECT: usize = 16;
/// Characters of an event that are told.
const SAID: usize = 600;
/// Parts of a pod and of its container that are this program's.
const OURS_OF_POD: &[&str] = &["containers", "restartPolicy", "volumes"];
const OURS_OF_CONTAINER: &[&str] = &["args", "command", "image", "name", "volumeMounts"];

/// The job system.
pub(super) struct Kubernetes;

/// A Kubernetes cluster, as `kubectl` reaches it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// Namespace of the jobs.
    #[schemars(regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    namespace: String,
    /// Image of the pods. It has this program, unless `program` lies on a volume.
    image: String,
    /// Path in the pods to a volume as Kubernetes words it:
    /// `{ /mnt/flowrun: { persistentVolumeClaim: { claimName: flowrun } } }`. The cache folder
    /// must lie on one that this machine has too, unless `through: remote`.
    #[serde(default)]
    volumes: BTreeMap<String, Map<String, Value>>,
    /// Context of the kubeconfig; the current one when left out.
    #[serde(default)]
    context: Option<String>,
    /// Path of `kubectl`, where it is not on the `PATH`.
    #[serde(default)]
    kubectl: Option<String>,
    /// How long a pod may wait for its start, in seconds.
    #[serde(default = "an_hour")]
    #[schemars(range(min = 1))]
    queue_timeout: u64,
    /// User id of the pods, 0 for root; that of this process when left out.
    #[serde(default)]
    user: Option<u32>,
    /// Group id of the pods; the same number as `user`, or that of this process.
    #[serde(default)]
    group: Option<u32>,
    /// What the cluster calls a GPU.
    #[serde(default = "nvidia")]
    gpu: String,
    /// Labels of jobs and pods.
    #[serde(default)]
    labels: BTreeMap<String, String>,
    /// Annotations of jobs and pods.
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    /// More fields of the pods' `spec`, as Kubernetes takes them: `serviceAccountName`,
    /// `nodeSelector`, `tolerations`, `imagePullSecrets`, ….
    #[serde(default)]
    pod: Map<String, Value>,
    /// More fields of their container: `envFrom`, `resources`, ….
    #[serde(default)]
    container: Map<String, Value>,
}

fn an_hour() -> u64 {
    3600
}

fn nvidia() -> String {
    "nvidia.com/gpu".to_owned()
}

struct Cluster {
    kubectl: Kubectl,
    settings: Settings,
    owner: Owner,
    /// Value of the label of all jobs of this project.
    project: String,
    /// What the last look gave. Held while there is another one.
    look: Mutex<Option<Looked>>,
    /// Ids of jobs that were there.
    known: Mutex<BTreeSet<String>>,
    waits: Mutex<BTreeMap<String, Wait>>,
}

/// A look, which is the answer to all who ask as long as it is new. So is a failure: a server
/// that hangs would else be waited for by each of them in turn.
struct Looked {
    /// When it began.
    at: Instant,
    took: Duration,
    seen: Result<Look, CallError>,
}

/// The jobs of the project at one time.
struct Look {
    jobs: BTreeMap<String, Value>,
    /// The newest pod of each.
    pods: BTreeMap<String, Value>,
}

/// A job that waits.
#[derive(Debug, Clone)]
struct Wait {
    since: Instant,
    /// When events were asked for, and what the last one said.
    asked: Option<Instant>,
    said: Option<String>,
}

impl JobKind for Kubernetes {
    fn name(&self) -> &'static str {
        "kubernetes"
    }
    fn about(&self) -> &'static str {
        "Jobs of a Kubernetes cluster, through `kubectl`."
    }
    fn settings_schema(&self) -> Value {
        schema_of::<Settings>()
    }
    fn example(&self) -> &'static str {
        "{ namespace: ml, image: 'registry/flowrun:1', volumes: { /mnt/flowrun: { persistentVolumeClaim: { claimName: flowrun } } } }"
    }
    fn open(&self, settings: &Value, world: &World) -> Result<Box<dyn JobSystem>, StepError> {
        let settings: Settings = serde_json::from_value(settings.clone())
            .map_err(|e| StepError::invalid(format!("`runners.kubernetes`: {e}")))?;
        Ok(Box::new(Cluster::new(settings, world)?))
    }
}

impl Cluster {
    fn new(settings: Settings, world: &World) -> Result<Self, StepError> {
        for (part, fields, ours) in [
            ("pod", &settings.pod, OURS_OF_POD),
            ("container", &settings.container, OURS_OF_CONTAINER),
        ] {
            if let Some(field) = ours.iter().find(|field| fields.contains_key(**field)) {
                let text = format!("`runners.kubernetes.{part}` may not hold `{field}`");
                let help = format!("flowrun writes {} itself", ours.join(", "));
                return Err(StepError::invalid(text).help(help));
            }
        }
        let owner = owner(&settings)?;
        let project = Digest::of_bytes(world.root.display().to_string().as_bytes()).to_hex();
        let kubectl = settings.kubectl.clone();
        Ok(Self {
            kubectl: Kubectl {
                program: kubectl.unwrap_or_else(|| "kubectl".to_owned()),
                context: settings.context.clone(),
                env: world.env.clone(),
            },
            owner,
            settings,
            project: project.chars().take(PROJECT).collect(),
            look: Mutex::default(),
            known: Mutex::default(),
            waits: Mutex::default(),
        })
    }

    /// Path of the namespace's jobs in the API.
    fn jobs(&self) -> String {
        let namespace = &self.settings.namespace;
        format!("/apis/batch/v1/namespaces/{namespace}/jobs")
    }

    /// Path of other things of the namespace.
    fn path(&self, kind: &str) -> String {
        let namespace = &self.settings.namespace;
        format!("/api/v1/namespaces/{namespace}/{kind}")
    }

    /// A job and its pod, if there is such a job.
    fn find(&self, id: &str) -> Result<Option<(Value, Option<Value>)>, CallError> {
        // Others wait meanwhile, for the same answer.
        let mut slot = lock(&self.look);
        let looked = match slot.take().filter(Looked::is_new) {
            Some(looked) => looked,
            None => self.look(),
        };
        let looked = slot.insert(looked);
        let look = looked.seen.as_ref().map_err(CallError::clone)?;
        let job = look.jobs.get(id).cloned();
        Ok(job.map(|job| (job, look.pods.get(id).cloned())))
    }

    fn look(&self) -> Looked {
        let at = Instant::now();
        let seen = self.see();
        Looked {
            at,
            took: at.elapsed(),
            seen,
        }
    }

    fn see(&self) -> Result<Look, CallError> {
        let label = manifest::PROJECT.replace('/', "%2F");
        let ours = format!("labelSelector={label}%3D{}", self.project);
        // Pods first: one that ended because its job was deleted is then not taken for lost.
        let mut pods = self.list("PodList", &format!("{}?{ours}", self.path("pods")))?;
        let jobs = self.list("JobList", &format!("{}?{ours}", self.jobs()))?;
        pods.sort_by(|a, b| made_at(a).cmp(made_at(b)));
        let named = jobs.into_iter().filter_map(|job| {
            let name = job["metadata"]["name"].as_str()?.to_owned();
            Some((name, job))
        });
        let of_jobs = pods.into_iter().filter_map(|pod| {
            let job = pod["metadata"]["labels"][manifest::JOB]
                .as_str()?
                .to_owned();
            Some((job, pod))
        });
        let look = Look {
            jobs: named.collect(),
            // The last of a job stays.
            pods: of_jobs.collect(),
        };
        lock(&self.known).extend(look.jobs.keys().cloned());
        Ok(look)
    }

    fn list(&self, kind: &str, path: &str) -> Result<Vec<Value>, CallError> {
        let answer = self.kubectl.get(path)?;
        match serde_json::from_str(&answer) {
            Ok(Value::Object(mut list)) if list.get("kind").is_some_and(|k| k == kind) => {
                match list.remove("items") {
                    Some(Value::Array(items)) => Ok(items),
                    // Go writes an empty list so.
                    _ => Ok(Vec::new()),
                }
            }
            _ => Err(CallError::nonsense(kind)),
        }
    }

    /// Deletes a job, which may be gone already; its pod goes along, before it or after it.
    fn delete(&self, id: &str, order: &str) -> Result<(), JobError> {
        let path = format!("{}/{id}?propagationPolicy={order}", self.jobs());
        match self.kubectl.delete(&path) {
            Ok(_) => Ok(()),
            Err(error) if error.reason == "NotFound" => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What is to be said of a job that waits: why, and whether it has waited for too long.
    fn waiting(&self, id: &str, why: String, object: Option<&str>) -> JobState {
        let wait = lock(&self.waits).get(id).cloned();
        let mut wait = wait.unwrap_or_else(|| Wait {
            since: Instant::now(),
            asked: None,
            said: None,
        });
        if let Some(object) = object
            && wait.asked.unwrap_or(wait.since).elapsed() >= EVENTS_EVERY
        {
            wait.asked = Some(Instant::now());
            wait.said = self.last_warning(object);
        }
        let mut why = match (object, &wait.said) {
            (Some(_), Some(said)) => format!("{why}: {said}"),
            _ => why,
        };
        let limit = self.settings.queue_timeout;
        let hopeless = wait.since.elapsed() >= Duration::from_secs(limit);
        if hopeless {
            why = format!("it waited for {limit} s (`queue_timeout`): {why}");
        }
        lock(&self.waits).insert(id.to_owned(), wait);
        JobState::Waiting { why, hopeless }
    }

    /// What the cluster warned of last about an object; nothing where it may not be asked.
    fn last_warning(&self, object: &str) -> Option<String> {
        let fields = format!("involvedObject.name%3D{object}%2Ctype%3DWarning");
        let path = format!("{}?fieldSelector={fields}", self.path("events"));
        let events = self.list("EventList", &path).ok()?;
        let last = events.iter().max_by_key(|event| {
            let times = [&event["lastTimestamp"], &event["eventTime"]];
            let time = times.into_iter().find_map(Value::as_str);
            time.unwrap_or_else(|| made_at(event)).to_owned()
        })?;
        let part = |name: &str| last[name].as_str().unwrap_or_default().trim();
        let said = format!("{}: {}", part("reason"), part("message"));
        Some(said.chars().take(SAID).collect())
    }
}

impl JobSystem for Cluster {
    fn name(&self) -> String {
        let namespace = &self.settings.namespace;
        let which = match &self.settings.context {
            Some(context) => format!(" of {context}"),
            None => match self.kubectl.env.get("KUBECONFIG") {
                Some(file) => format!(" of {file}"),
                None => String::new(),
            },
        };
        format!("Kubernetes{which}, namespace {namespace}")
    }

    fn submit(&self, order: &JobOrder<'_>) -> Result<(), JobError> {
        let mut mounts = self.settings.volumes.keys();
        if let Some(folder) = order.folder
            && !mounts.any(|path| folder.starts_with(path))
        {
            let folder = folder.display();
            return Err(JobError::Refused {
                text: format!("the pods do not see {folder}: it lies on none of `volumes`"),
                help: Some(
                    "the cache folder must lie on a volume that this machine has too; where its path here is another than in the pods, say so with `shared` of the runner; without such a volume, use a remote cache and `through: remote`"
                        .to_owned(),
                ),
            });
        }
        let job = manifest::job(&self.settings, self.owner, &self.project, order);
        let path = format!("{}?fieldValidation=Strict", self.jobs());
        let made = match self.kubectl.create(&path, &job) {
            Ok(answer) => answer,
            // The answer to an earlier order was lost.
            Err(error) if error.reason == "AlreadyExists" => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let made: Value = serde_json::from_str(&made).unwrap_or_default();
        if made["kind"] != "Job" {
            return Err(CallError::nonsense("Job").into());
        }
        lock(&self.known).insert(order.id.to_owned());
        let mut slot = lock(&self.look);
        match slot.as_mut().map(|looked| &mut looked.seen) {
            // What was seen before it was made lacks it, which would mean that somebody deleted it.
            Some(Ok(look)) => {
                look.jobs.insert(order.id.to_owned(), made);
            }
            // The server answers again.
            Some(Err(_)) => *slot = None,
            None => {}
        }
        Ok(())
    }

    fn state(&self, order: &JobOrder<'_>) -> Result<JobState, JobError> {
        let found = self.find(order.id).map_err(CallError::of_question)?;
        let Some((job, pod)) = found else {
            // One that was there is gone because somebody deleted it.
            return Ok(match lock(&self.known).contains(order.id) {
                true => JobState::Ended(JobEnd::Stopped),
                false => JobState::Unknown,
            });
        };
        Ok(match outcome::told(&job, pod.as_ref()) {
            Told::State(JobState::Waiting {
                why,
                hopeless: false,
            }) => self.waiting(order.id, why, None),
            Told::Unclear { why, object } => self.waiting(order.id, why, Some(&object)),
            // Its process is told to stop because somebody deletes the job.
            Told::State(JobState::Ended(JobEnd::Killed(_))) if is_going(&job) => {
                JobState::Ended(JobEnd::Stopped)
            }
            Told::State(state) => {
                lock(&self.waits).remove(order.id);
                state
            }
        })
    }

    fn stop(&self, id: &str) -> Result<(), JobError> {
        // So it stands until its pod is gone.
        self.delete(id, "Foreground")?;
        *lock(&self.look) = None;
        Ok(())
    }

    fn forget(&self, id: &str) -> Result<bool, JobError> {
        // Nobody may ask again: only one that hung is not asked anew.
        let failed_at_once = |looked: &Looked| looked.seen.is_err() && looked.took < LOOK_EVERY;
        let mut slot = lock(&self.look);
        if slot.as_ref().is_some_and(failed_at_once) {
            *slot = None;
        }
        drop(slot);
        let found = self.find(id).map_err(CallError::of_question)?;
        if let Some((job, pod)) = found {
            let told = outcome::told(&job, pod.as_ref());
            let over = matches!(told, Told::State(JobState::Ended(_)));
            match (is_going(&job), over) {
                (true, _) => {}
                (false, true) => self.delete(id, "Background")?,
                (false, false) => return Ok(false),
            }
        }
        if let Some(Ok(look)) = lock(&self.look).as_mut().map(|looked| &mut looked.seen) {
            look.jobs.remove(id);
        }
        lock(&self.known).remove(id);
        lock(&self.waits).remove(id);
        Ok(true)
    }
}

impl Looked {
    fn is_new(&self) -> bool {
        let long = match self.seen {
            Ok(_) => self.took * SHARE,
            // As long again as it took: the server may be back soon.
            Err(_) => self.took * 2,
        };
        self.at.elapsed() < LOOK_EVERY.max(long)
    }
}

/// Whose files the pods are to have.
fn owner(settings: &Settings) -> Result<Owner, StepError> {
    let here = geteuid();
    if settings.user.is_none() && here.is_root() {
        let text = "`runners.kubernetes`: flowrun runs as root here, and its pods would too";
        let help = "run flowrun as the user whom the files on the volume belong to, or name one with `user`; `user: 0` is root";
        return Err(StepError::invalid(text).help(help));
    }
    Ok(Owner {
        user: settings.user.unwrap_or_else(|| here.as_raw()),
        group: settings
            .group
            .or(settings.user)
            .unwrap_or_else(|| getegid().as_raw()),
    })
}

/// Somebody deletes it, and it waits for its pod's end.
fn is_going(job: &Value) -> bool {
    job["metadata"]["deletionTimestamp"].is_string()
}

/// When an object was made, in the one form in which times sort as text.
fn made_at(object: &Value) -> &str {
    let time = object["metadata"]["creationTimestamp"].as_str();
    time.unwrap_or_default()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use flowrun_engine::pipeline::Resources;
    use serde_json::json;

    use super::*;

    fn cluster(more: &[(&str, Value)]) -> Result<Cluster, StepError> {
        let mut settings = json!({
            "namespace": "ml",
            "image": "registry.example/flowrun:1",
            "user": 10001,
            "kubectl": "/nowhere/kubectl",
            "volumes": {"/mnt/flowrun": {"persistentVolumeClaim": {"claimName": "flowrun"}}},
        });
        for (name, value) in more {
            settings[*name] = value.clone();
        }
        Cluster::new(serde_json::from_value(settings).unwrap(), &World::default())
    }

    #[test]
    fn what_flowrun_writes_itself_is_no_setting() {
        for (part, field) in [("pod", "containers"), ("container", "command")] {
            let refused = cluster(&[(part, json!({ field: [] }))]).err();
            let text = refused.map(|error| error.message).unwrap_or_default();
            assert!(text.contains(&format!("`{field}`")), "{part}: {text}");
        }
        let owner = cluster(&[]).unwrap().owner;
        assert_eq!((owner.user, owner.group), (10001, 10001));
    }

    #[test]
    fn a_folder_that_the_pods_do_not_see_is_told_before_anything_is_ordered() {
        let cluster = cluster(&[]).unwrap();
        let resources = Resources::default();
        let submit = |folder: &str| {
            let ended = cluster.submit(&JobOrder {
                id: "flowrun-1",
                step: "a",
                run: "r",
                timeout: None,
                program: "flowrun",
                args: Vec::new(),
                folder: Some(Path::new(folder)),
                variables: &[],
                resources: &resources,
            });
            ended.unwrap_err().to_string()
        };
        assert!(submit("/home/me/.flowrun/jobs/k/1").contains("none of `volumes`"));
        // This one is seen; only the program is missing.
        assert!(submit("/mnt/flowrun/jobs/k/1").contains("/nowhere/kubectl"));
    }

    #[test]
    fn a_look_that_failed_is_the_answer_to_all_who_ask() {
        let mut cluster = cluster(&[]).unwrap();
        let failed = cluster.find("a").unwrap_err();
        lock(&cluster.look).as_mut().unwrap().took = Duration::from_secs(3600);
        // Another look would fail otherwise.
        cluster.kubectl.program = "/elsewhere/kubectl".to_owned();
        assert_eq!(cluster.find("b").unwrap_err(), failed);
        lock(&cluster.look).as_mut().unwrap().took = Duration::ZERO;
        lock(&cluster.look).as_mut().unwrap().at -= LOOK_EVERY;
        assert_ne!(cluster.find("b").unwrap_err(), failed);
    }

    #[test]
    fn the_example_fits_the_schema() {
        let schema = Kubernetes.settings_schema();
        let example: Value = serde_yaml::from_str(Kubernetes.example()).unwrap();
        let _: Settings = serde_json::from_value(example.clone()).unwrap();
        let mut names = example.as_object().unwrap().keys();
        let known = |name: &String| schema["properties"].get(name).is_some();
        assert!(names.all(known), "{schema}");
    }
}
