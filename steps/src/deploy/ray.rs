//! [`Cluster`]: the target `ray-serve` where a dashboard is named: the rendered application, served
//! by Ray through its Serve API.
//!
//! Each version is an application of its own, `NAME-DIGEST`. The new one is started beside the one
//! in use, on a route of its own, and asked the smoke rows there; then it takes the route over and
//! the old one goes. Ray alone would replace replicas in their place, and one that cannot start
//! would have taken the place of one that answers.
//!
//! Invariant: whatever fails, the body that was there before is put back; applications of others
//! go back to Ray as they came.

use std::path::Path;
use std::time::{Duration, Instant};

use flowrun_cache::Digest;
use flowrun_engine::step::{Cancel, StepError, StepErrorKind, World};
use reqwest::Method;
use reqwest::blocking::Body;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::package::Package;
use super::server::Endpoint;
use crate::dashboard::{Dashboard, PACKAGE};

/// How long an application may take to be served.
const STARTUP: Duration = Duration::from_secs(600);
const POLL: Duration = Duration::from_millis(300);
/// Hex digits of a digest that tell versions apart.
const SHORT: usize = 12;
const APPLICATIONS: &str = "/api/serve/applications/";

/// A Ray cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ClusterSpec {
    /// Address of its dashboard, `http://127.0.0.1:8265`. A token is taken from `RAY_AUTH_TOKEN`.
    #[schemars(url, regex(pattern = "^https?://"))]
    dashboard: String,
    /// Where its applications answer; else the dashboard's host with the port of Ray's proxy.
    #[serde(default)]
    #[schemars(regex(pattern = "^https?://"))]
    url: Option<String>,
}

/// What is to be served.
pub(super) struct Version {
    /// The rendered `serve.yaml`.
    body: Value,
    /// The working folder of its replicas.
    package: Package,
}

/// The cluster's Serve API.
pub(super) struct Cluster {
    dashboard: Dashboard,
    url: Option<String>,
}

/// What Ray says that it serves.
#[derive(Debug, Clone)]
struct Served(Value);

/// What Ray says of one application.
pub(super) struct Look {
    /// Its word for the state; none where it does not know the application.
    pub(super) status: Option<String>,
    /// Seconds since 1970 when it was deployed there.
    pub(super) since: Option<u64>,
    /// Where it answers.
    pub(super) url: Option<String>,
    /// What went wrong, as far as Ray says.
    pub(super) why: String,
}

impl ClusterSpec {
    /// # Errors
    /// Failed when no client can be made.
    pub(super) fn open(&self, world: &World) -> Result<Cluster, StepError> {
        Ok(Cluster {
            dashboard: Dashboard::open(&self.dashboard, world)?,
            url: self.url.clone(),
        })
    }

    /// Both name one cluster.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (&self.dashboard, &other.dashboard);
        one.trim_end_matches('/') == two.trim_end_matches('/')
    }
}

impl Cluster {
    /// What is served of `name`, for the step's premises.
    pub(super) fn observe(&self, name: &str) -> Value {
        match self.served() {
            Ok(served) => served.states_of(name),
            Err(_) => "not reached".into(),
        }
    }

    /// What Ray says of an application.
    ///
    /// # Errors
    /// Failed when Ray cannot be reached.
    pub(super) fn look(&self, application: &str) -> Result<Look, StepError> {
        let served = self.served()?;
        let since = served.0["applications"][application]["last_deployed_time_s"].as_f64();
        let route = served.route(application);
        let url = route.map(|route| self.address(&served.0["http_options"], route));
        Ok(Look {
            status: served.state(application).map(str::to_owned),
            since: since.map(|since| since as u64),
            url: url.transpose()?,
            why: served.why(application),
        })
    }

    /// Serves a version in the place of the one before it, once `smoke` has nothing against it.
    /// One that is served already is only asked. Gives its address.
    ///
    /// # Errors
    /// Gate when it does not come up or does not answer as it should; failed when Ray cannot be
    /// reached or refuses it. What was served before is served still.
    pub(super) fn deploy(
        &self,
        version: &Version,
        world: &World,
        cancel: &Cancel,
        smoke: &dyn Fn(&Endpoint) -> Result<(), StepError>,
    ) -> Result<String, StepError> {
        let before = self.served()?;
        let name = version.application();
        let url = self.address(&version.options(&before), &version.route())?;
        // One that a killed deployment left aside has not taken the route over.
        let in_place = before.route(&name) == Some(version.route().as_str());
        if in_place && before.state(&name) == Some("RUNNING") {
            smoke(&Endpoint::new(&url, world)?)?;
            return Ok(url);
        }
        let package = &version.package;
        let uploaded = self.dashboard.upload(&package.name, &package.path);
        uploaded.map_err(StepError::failed)?;
        match self.switch(version, &before, world, cancel, smoke) {
            Ok(()) => Ok(url),
            Err(error) => {
                let back = self.put(&before.body(version, before.applications()));
                Err(match back {
                    Ok(()) => error,
                    Err(why) => StepError {
                        message: format!(
                            "{}; what was served before could not be put back: {}",
                            error.message, why.message
                        ),
                        ..error
                    },
                })
            }
        }
    }

    fn switch(
        &self,
        version: &Version,
        before: &Served,
        world: &World,
        cancel: &Cancel,
        smoke: &dyn Fn(&Endpoint) -> Result<(), StepError>,
    ) -> Result<(), StepError> {
        let name = version.application();
        let aside = format!("/{name}");
        let mut all = before.configs(|application| application != name);
        all.push(version.config(&aside));
        self.put(&before.body(version, all))?;
        self.wait_until_running(&name, cancel)?;
        let there = self.address(&version.options(before), &aside)?;
        smoke(&Endpoint::new(&there, world)?)?;
        let mut others = before.others(version.name());
        others.push(version.config(&version.route()));
        self.put(&before.body(version, others))?;
        self.wait_until_running(&name, cancel)
    }

    fn wait_until_running(&self, name: &str, cancel: &Cancel) -> Result<(), StepError> {
        let gate = |why: String| {
            let text = format!("nothing was deployed: Ray does not serve `{name}`: {why}");
            StepError::new(StepErrorKind::Gate, text)
        };
        let deadline = Instant::now() + STARTUP;
        loop {
            if cancel.is_cancelled() {
                return Err(StepError::cancelled());
            }
            let served = self.served()?;
            match served.state(name) {
                Some("RUNNING") => return Ok(()),
                Some("DEPLOY_FAILED" | "UNHEALTHY") => return Err(gate(served.why(name))),
                _ if Instant::now() > deadline => {
                    let seconds = STARTUP.as_secs();
                    return Err(gate(format!("not after {seconds} s: {}", served.why(name))));
                }
                _ => std::thread::sleep(POLL),
            }
        }
    }

    fn served(&self) -> Result<Served, StepError> {
        let text = self.call(Method::GET, APPLICATIONS, None)?;
        serde_json::from_str(&text).map(Served).map_err(|e| {
            let address = self.dashboard.address();
            StepError::failed(format!("{address} is no dashboard of Ray: {e}"))
        })
    }

    fn put(&self, body: &Value) -> Result<(), StepError> {
        self.call(Method::PUT, APPLICATIONS, Some(body.to_string().into()))
            .map(|_| ())
    }

    fn call(&self, method: Method, path: &str, body: Option<Body>) -> Result<String, StepError> {
        let answer = self.dashboard.call(method, path, body).map_err(|why| {
            StepError::failed(why).help(format!(
                "it comes with `ray start --head --include-dashboard=true`, from the package `{PACKAGE}`"
            ))
        })?;
        match answer.is_ok() {
            true => Ok(answer.text),
            false => Err(StepError::failed(format!("Ray refused {path}: {answer}"))),
        }
    }

    /// Where the application on `route` answers.
    fn address(&self, options: &Value, route: &str) -> Result<String, StepError> {
        let given = self.url.as_deref().unwrap_or(self.dashboard.address());
        let bad = |why: String| StepError::invalid(format!("`{given}` is no address: {why}"));
        let mut url = reqwest::Url::parse(given).map_err(|e| bad(e.to_string()))?;
        if self.url.is_none() {
            let port = options["port"].as_u64().and_then(|p| u16::try_from(p).ok());
            url.set_port(port)
                .map_err(|()| bad("it takes no port".to_owned()))?;
        }
        Ok(format!(
            "{}{}",
            url.as_str().trim_end_matches('/'),
            route.trim_end_matches('/')
        ))
    }
}

impl Version {
    /// Packs the rendered files in `folder` into `scratch`.
    ///
    /// # Errors
    /// When they cannot be read or packed.
    pub(super) fn pack(folder: &Path, scratch: &Path) -> Result<Self, StepError> {
        let path = folder.join("serve.yaml");
        let text = std::fs::read_to_string(&path).map_err(|e| StepError::io(&path, &e))?;
        let body = serde_yaml::from_str(&text);
        Ok(Self {
            body: body.map_err(|e| StepError::failed(format!("{}: {e}", path.display())))?,
            package: Package::pack(folder, &["flowrun_app.py", "bundle"], scratch)?,
        })
    }

    /// What it is called, without its version.
    fn name(&self) -> &str {
        self.body["applications"][0]["name"]
            .as_str()
            .unwrap_or_default()
    }

    /// Its application's name at Ray: another one where anything in it is another.
    pub(super) fn application(&self) -> String {
        let what = json!([self.package.name, self.body["applications"]]);
        let digest = Digest::of_record("ray-application", &what).to_hex();
        format!("{}-{}", self.name(), &digest[..SHORT.min(digest.len())])
    }

    fn route(&self) -> String {
        let route = self.body["applications"][0]["route_prefix"].as_str();
        route.unwrap_or("/").to_owned()
    }

    /// Its application on `route`, out of the package.
    fn config(&self, route: &str) -> Value {
        let mut config = self.body["applications"][0].clone();
        config["name"] = self.application().into();
        config["route_prefix"] = route.into();
        config["args"]["bundle"] = "bundle".into();
        config["runtime_env"] = json!({"working_dir": format!("gcs://{}", self.package.name)});
        config
    }

    /// Ray's proxies keep the options that they were started with.
    fn options(&self, before: &Served) -> Value {
        match &before.0["http_options"] {
            Value::Null => self.body["http_options"].clone(),
            options => options.clone(),
        }
    }
}

impl Served {
    fn state(&self, name: &str) -> Option<&str> {
        self.0["applications"][name]["status"].as_str()
    }

    /// The route that it is to have.
    fn route(&self, name: &str) -> Option<&str> {
        let config = &self.0["applications"][name]["deployed_app_config"];
        config["route_prefix"].as_str()
    }

    /// What went wrong, as far as Ray says.
    fn why(&self, name: &str) -> String {
        let application = &self.0["applications"][name];
        let deployments = application["deployments"].as_object();
        let deployments = deployments.into_iter().flatten();
        let mut all = vec![application["message"].as_str().unwrap_or_default()];
        all.extend(deployments.filter_map(|(_, deployment)| deployment["message"].as_str()));
        all.retain(|text| !text.trim().is_empty());
        all.join(" ").trim().to_owned()
    }

    /// The configurations of all applications.
    fn applications(&self) -> Vec<Value> {
        self.configs(|_| true)
    }

    /// Those that are no version of `name`.
    fn others(&self, name: &str) -> Vec<Value> {
        self.configs(|application| !is_version(application, name))
    }

    fn configs(&self, keep: impl Fn(&str) -> bool) -> Vec<Value> {
        let all = self.0["applications"].as_object().into_iter().flatten();
        all.filter(|(application, _)| keep(application))
            .map(|(_, state)| state["deployed_app_config"].clone())
            .filter(|config| !config.is_null())
            .collect()
    }

    fn states_of(&self, name: &str) -> Value {
        let all = self.0["applications"].as_object().into_iter().flatten();
        all.filter(|(application, _)| is_version(application, name))
            .map(|(application, state)| {
                json!({"name": application, "status": state["status"],
                    "deployed": state["last_deployed_time_s"]})
            })
            .collect()
    }

    /// The body that asks for `applications`, with what else is set.
    fn body(&self, version: &Version, applications: Vec<Value>) -> Value {
        let mut body = version.body.clone();
        body["http_options"] = version.options(self);
        if !self.0["proxy_location"].is_null() {
            body["proxy_location"] = self.0["proxy_location"].clone();
        }
        body["applications"] = applications.into();
        body
    }
}

/// Whether an application is `name`, as the rendered file calls it, or a version of it.
fn is_version(application: &str, name: &str) -> bool {
    let Some(rest) = application.strip_prefix(name) else {
        return false;
    };
    let digest = rest.strip_prefix('-');
    rest.is_empty()
        || digest.is_some_and(|d| d.len() == SHORT && d.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn served() -> Served {
        let state = |name: &str| json!({"status": "RUNNING", "message": "", "deployed_app_config": {"name": name}});
        Served(json!({
            "proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": 8100},
            "applications": {
                "intents-0123456789ab": state("intents-0123456789ab"), "intents": state("intents"),
                "intents-two": state("intents-two"), "other": state("other"),
            },
        }))
    }

    #[test]
    fn applications_of_others_are_kept_and_versions_of_ours_go() {
        let kept = served().others("intents");
        let names: Vec<&str> = kept.iter().map(|c| c["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["intents-two", "other"]);
        assert_eq!(served().applications().len(), 4);
    }

    #[test]
    fn a_route_is_that_of_the_application_as_it_was_asked_for() {
        let served = Served(json!({"applications": {
            "a": {"status": "RUNNING", "deployed_app_config": {"route_prefix": "/a"}},
            "b": {"status": "DELETING", "deployed_app_config": null},
        }}));
        assert_eq!(served.route("a"), Some("/a"));
        assert_eq!((served.route("b"), served.route("c")), (None, None));
    }

    #[test]
    fn what_is_running_already_keeps_its_options() {
        let version = |cpus: u32| Version {
            package: Package {
                path: "p.zip".into(),
                name: "_ray_pkg_0123456789abcdef.zip".to_owned(),
            },
            body: json!({"proxy_location": "EveryNode", "http_options": {"port": 8000},
                "applications": [{"name": "intents", "route_prefix": "/", "cpus": cpus,
                    "args": {"bundle": "/opt"}}]}),
        };
        assert_ne!(version(1).application(), version(2).application());
        let version = version(1);
        assert!(is_version(&version.application(), "intents"));
        let body = served().body(&version, vec![version.config("/x")]);
        assert_eq!(body["http_options"]["port"], 8100);
        assert_eq!(body["proxy_location"], "HeadOnly");
        let config = &body["applications"][0];
        assert_eq!(config["name"], version.application());
        assert_eq!(config["args"]["bundle"], "bundle");
        let folder = &config["runtime_env"]["working_dir"];
        assert_eq!(folder, "gcs://_ray_pkg_0123456789abcdef.zip");
        let nothing = Served(json!({"applications": {}}));
        assert_eq!(version.options(&nothing)["port"], 8000);
    }

    #[test]
    fn an_address_is_the_proxys() {
        let cluster = Cluster {
            dashboard: Dashboard::open("http://10.0.0.1:8265/", &World::default()).unwrap(),
            url: None,
        };
        let options = json!({"port": 8100});
        assert_eq!(
            cluster.address(&options, "/").unwrap(),
            "http://10.0.0.1:8100"
        );
        assert_eq!(
            cluster.address(&options, "/a").unwrap(),
            "http://10.0.0.1:8100/a"
        );
        let mut named = cluster;
        named.url = Some("https://ray.bank.example/intents/".to_owned());
        assert_eq!(
            named.address(&options, "/a").unwrap(),
            "https://ray.bank.example/intents/a"
        );
    }
}
