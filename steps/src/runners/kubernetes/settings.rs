//! [`Settings`]: how jobs are to run on a cluster, as the pipeline's `runners` say it.

use std::collections::BTreeMap;
use std::path::Path;

use flowrun_engine::step::StepError;
use nix::unistd::{getegid, geteuid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::manifest::Owner;

/// Parts of a pod and of its container that are this program's.
const OURS_OF_POD: &[&str] = &["containers", "restartPolicy", "volumes"];
const OURS_OF_CONTAINER: &[&str] = &["args", "command", "image", "name", "volumeMounts"];

/// A Kubernetes cluster, as `kubectl` reaches it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    /// Namespace of the jobs.
    #[schemars(regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub(super) namespace: String,
    /// Image of the pods. It has this program, unless `program` lies on a volume.
    pub(super) image: String,
    /// Path in the pods to a volume as Kubernetes words it:
    /// `{ /mnt/flowrun: { persistentVolumeClaim: { claimName: flowrun } } }`. The cache folder
    /// must lie on one that this machine has too, unless `through: remote`.
    #[serde(default)]
    pub(super) volumes: BTreeMap<String, Map<String, Value>>,
    /// Context of the kubeconfig; the current one when left out.
    #[serde(default)]
    pub(super) context: Option<String>,
    /// Path of `kubectl`, where it is not on the `PATH`.
    #[serde(default)]
    pub(super) kubectl: Option<String>,
    /// How long a pod may wait for its start, in seconds.
    #[serde(default = "an_hour")]
    #[schemars(range(min = 1))]
    pub(super) queue_timeout: u64,
    /// User id of the pods, 0 for root; that of this process when left out.
    #[serde(default)]
    user: Option<u32>,
    /// Group id of the pods; the same number as `user`, or that of this process.
    #[serde(default)]
    group: Option<u32>,
    /// What the cluster calls a GPU.
    #[serde(default = "nvidia")]
    pub(super) gpu: String,
    /// Labels of jobs and pods.
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    /// Annotations of jobs and pods.
    #[serde(default)]
    pub(super) annotations: BTreeMap<String, String>,
    /// More fields of the pods' `spec`, as Kubernetes takes them: `serviceAccountName`,
    /// `nodeSelector`, `tolerations`, `imagePullSecrets`, ….
    #[serde(default)]
    pub(super) pod: Map<String, Value>,
    /// More fields of their container: `envFrom`, `resources`, ….
    #[serde(default)]
    pub(super) container: Map<String, Value>,
}

fn an_hour() -> u64 {
    3600
}

fn nvidia() -> String {
    "nvidia.com/gpu".to_owned()
}

impl Settings {
    /// As the pipeline has them.
    pub(super) fn read(settings: &Value) -> Result<Self, StepError> {
        let settings = serde_json::from_value(settings.clone());
        settings.map_err(|e| StepError::invalid(format!("`runners.kubernetes`: {e}")))
    }

    /// This path of the pods lies on a volume.
    pub(super) fn mounts(&self, path: &Path) -> bool {
        self.volumes.keys().any(|mount| path.starts_with(mount))
    }

    /// Refuses what would overwrite what flowrun writes itself.
    pub(super) fn check(&self) -> Result<(), StepError> {
        for (part, fields, ours) in [
            ("pod", &self.pod, OURS_OF_POD),
            ("container", &self.container, OURS_OF_CONTAINER),
        ] {
            if let Some(field) = ours.iter().find(|field| fields.contains_key(**field)) {
                let text = format!("`runners.kubernetes.{part}` may not hold `{field}`");
                let help = format!("flowrun writes {} itself", ours.join(", "));
                return Err(StepError::invalid(text).help(help));
            }
        }
        Ok(())
    }

    /// Whose files the pods are to have.
    pub(super) fn owner(&self) -> Result<Owner, StepError> {
        let here = geteuid();
        if self.user.is_none() && here.is_root() {
            let text = "`runners.kubernetes`: flowrun runs as root here, and its pods would too";
            let help = "run flowrun as the user whom the files on the volume belong to, or name one with `user`; `user: 0` is root";
            return Err(StepError::invalid(text).help(help));
        }
        Ok(Owner {
            user: self.user.unwrap_or_else(|| here.as_raw()),
            group: self
                .group
                .or(self.user)
                .unwrap_or_else(|| getegid().as_raw()),
        })
    }
}
