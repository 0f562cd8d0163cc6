//! `kubernetes`: Jobs of a Kubernetes cluster, through the user's `kubectl`. The files of a job
//! lie on a volume that the pods and this machine both have.
//!
//! | file | does |
//! |---|---|
//! | this one | order, stop, forget |
//! | `look` | the jobs of the project at one time |
//! | `waiting` | why a job waits |
//! | `settings` | what the pipeline says of the cluster |
//! | `manifest` | the Job that is ordered |
//! | `outcome` | what a Job and its pod say; pure |
//! | `kubectl` | raw requests |
//!
//! All jobs of a project are looked at together, so that many cost no more calls than one.
//! What was run on a cluster: `docs/connected.md`.

mod kubectl;
mod look;
mod manifest;
mod outcome;
mod settings;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use flowrun_cache::Digest;
use flowrun_engine::runner::{JobEnd, JobError, JobKind, JobOrder, JobState, JobSystem};
use flowrun_engine::step::{StepError, World};
use serde_json::Value;

use self::kubectl::{CallError, Kubectl};
use self::look::{LOOK_EVERY, Looked};
use self::manifest::Owner;
use self::outcome::Told;
use self::settings::Settings;
use self::waiting::Wait;
use crate::schema_of;

/// Hex digits of the project's label.
const PROJECT: usize = 16;

/// The job system.
pub(super) struct Kubernetes;

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
        Ok(Box::new(Cluster::new(Settings::read(settings)?, world)?))
    }
    fn sees(&self, settings: &Value, remote: &Path) -> Result<(), StepError> {
        if Settings::read(settings)?.mounts(remote) {
            return Ok(());
        }
        let text = format!(
            "the pods do not see the remote cache: {} lies on none of `volumes`",
            remote.display()
        );
        Err(StepError::invalid(text).help(
            "a folder must lie on a volume that this machine has at the same path as the pods; a bucket needs none",
        ))
    }
}

impl Cluster {
    fn new(settings: Settings, world: &World) -> Result<Self, StepError> {
        settings.check()?;
        let owner = settings.owner()?;
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
        if let Some(folder) = order.folder
            && !self.settings.mounts(folder)
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

/// Somebody deletes it, and it waits for its pod's end.
fn is_going(job: &Value) -> bool {
    job["metadata"]["deletionTimestamp"].is_string()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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
    fn a_remote_cache_that_is_a_folder_lies_on_a_volume() {
        let settings = json!({
            "namespace": "ml", "image": "registry.example/flowrun:1",
            "volumes": {"/mnt/flowrun/": {"persistentVolumeClaim": {"claimName": "flowrun"}}},
        });
        let sees = |folder: &str| Kubernetes.sees(&settings, Path::new(folder));
        assert!(sees("/mnt/flowrun/store").is_ok());
        for folder in ["/mnt/flowrunner", "/srv/store", "/mnt"] {
            let unseen = sees(folder).unwrap_err();
            assert!(unseen.message.contains(folder), "{}", unseen.message);
            assert!(unseen.message.contains("none of `volumes`"));
        }
    }

    #[test]
    fn a_look_that_failed_is_the_answer_to_all_who_ask() {
        use std::time::Duration;
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
