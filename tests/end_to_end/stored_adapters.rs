//! Adapters that a server loads from an object store by the names in requests, as Ray Serve LLM
//! does. The server is this program's; what stands before it gets the adapters from the store.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use serde_json::{Value, json};

use crate::project::{Project, Run};
use crate::receiver::Receiver;
use crate::server::{Server, client};
use crate::tiny::{self, answers, answers_here, write_model};
use crate::weed::Weed;

const FILES: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];

/// A store, seen from behind.
trait Store: Send + Sync + 'static {
    /// Of the folder of adapters.
    fn url(&self) -> String;
    /// All files there, as `<adapter>/<file>`.
    fn files(&self) -> BTreeMap<String, Vec<u8>>;
    fn write(&self, file: &str, bytes: &[u8]);
    fn remove(&self, file: &str);
    /// Runs the binary with what it needs for the store.
    fn run(&self, project: &Project, args: &[&str]) -> Run;
}

struct Folder(PathBuf);

impl Store for Folder {
    fn url(&self) -> String {
        format!("file://{}", self.0.display())
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut all = BTreeMap::new();
        for adapter in std::fs::read_dir(&self.0).into_iter().flatten() {
            let adapter = adapter.unwrap();
            for file in std::fs::read_dir(adapter.path()).unwrap() {
                let file = file.unwrap();
                let name = [adapter.file_name(), file.file_name()];
                let name = name.map(|name| name.into_string().unwrap()).join("/");
                all.insert(name, std::fs::read(file.path()).unwrap());
            }
        }
        all
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        std::fs::write(self.0.join(file), bytes).unwrap();
    }

    fn remove(&self, file: &str) {
        std::fs::remove_file(self.0.join(file)).unwrap();
    }

    fn run(&self, project: &Project, args: &[&str]) -> Run {
        project.run(args)
    }
}

/// A folder of the bucket.
const IN_BUCKET: &str = "team/adapters";

impl Store for Weed {
    fn url(&self) -> String {
        format!("s3://flow/{IN_BUCKET}")
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let all = Weed::files(self, IN_BUCKET).into_iter();
        let own = |path: &str| path.strip_prefix(IN_BUCKET).unwrap()[1..].to_owned();
        all.map(|(path, bytes)| (own(&path), bytes)).collect()
    }

    fn write(&self, file: &str, bytes: &[u8]) {
        Weed::write(self, &format!("{IN_BUCKET}/{file}"), bytes);
    }

    fn remove(&self, file: &str) {
        Weed::remove(self, &format!("{IN_BUCKET}/{file}"));
    }

    fn run(&self, project: &Project, args: &[&str]) -> Run {
        Weed::run(self, project, args)
    }
}

/// Stands before a server, and has an adapter lie in its folder when one is first asked for.
struct Loader<S> {
    upstream: String,
    /// Where the server looks.
    folder: PathBuf,
    /// Gone with the test, which this outlives.
    store: Weak<S>,
    loaded: Mutex<BTreeSet<String>>,
}

impl<S: Store> Loader<S> {
    fn answer(&self, path: &str, body: &Value) -> (u16, String) {
        let model = body["model"].as_str().unwrap_or_default();
        if let Some((_, adapter)) = model.split_once(':')
            && !self.load(adapter)
        {
            let missing = json!({"detail": format!("Unable to find {adapter}")});
            return (404, missing.to_string());
        }
        let url = format!("{}{path}", self.upstream);
        let answer = client().post(url).json(body).send().unwrap();
        (answer.status().as_u16(), answer.text().unwrap())
    }

    /// Whether it is there now.
    fn load(&self, adapter: &str) -> bool {
        // Held while it is fetched, so that nobody sees half of it.
        let mut loaded = self.loaded.lock().unwrap();
        if loaded.contains(adapter) {
            return true;
        }
        let Some(store) = self.store.upgrade() else {
            return false;
        };
        let there = store.files();
        let found = FILES.map(|file| there.get(&format!("{adapter}/{file}")));
        if found.iter().any(Option::is_none) {
            return false;
        }
        let folder = self.folder.join(adapter);
        std::fs::create_dir_all(&folder).unwrap();
        for (file, bytes) in FILES.iter().zip(found.into_iter().flatten()) {
            std::fs::write(folder.join(file), bytes).unwrap();
        }
        loaded.insert(adapter.to_owned())
    }
}

fn adapters_are_found_in(store: Arc<impl Store>) {
    let home = Project::new();
    write_model(&home.path("tiny"), 1);
    std::fs::create_dir_all(home.path("adapters")).unwrap();
    let mut command = home.command(&["serve", "tiny", "--adapters", "adapters"]);
    command.env_remove("FLOWRUN_API_KEY");
    let server = Server::start(command);
    let loader = Arc::new(Loader {
        upstream: server.url.clone(),
        folder: home.path("adapters"),
        store: Arc::downgrade(&store),
        loaded: Mutex::default(),
    });
    let own = Arc::clone(&loader);
    let before = Receiver::start(move |_, sent| {
        let body = serde_json::from_slice::<Value>(&sent.body);
        // Status 0 hangs up.
        body.map_or((0, String::new()), |body| own.answer(&sent.path, &body))
    });

    let project = tiny::project();
    let student = format!(
        "  student:\n    provider: openai\n    base_url: {}/v1\n    model: tiny\n    guided: vllm\n    adapters: {{ url: '{}' }}\n",
        before.url,
        store.url()
    );
    let backend = tiny::stand_in_trainer(&project);
    tiny::train(&project, Some(&student), &backend);
    let run = |more: &[&str]| {
        let args = [&["--json", "pipeline.yaml"], more].concat();
        store.run(&project, &args)
    };

    let elsewhere = answers(&project, &run(&[]).ok());
    assert_eq!(elsewhere.len(), 3);
    assert_eq!(answers_here(&project), elsewhere);
    let asked = loader.loaded.lock().unwrap().clone();
    assert_eq!(asked.len(), 2, "{asked:?}");
    let put = store.files();
    let expected = asked
        .iter()
        .flat_map(|name| FILES.map(|file| format!("{name}/{file}")));
    let expected: BTreeSet<String> = expected.collect();
    assert_eq!(put.keys().cloned().collect::<BTreeSet<_>>(), expected);

    // Answers that are kept need no adapter.
    for file in put.keys() {
        store.remove(file);
    }
    let again = run(&["--force"]).ok();
    assert_eq!(answers(&project, &again), elsewhere);
    assert_eq!(store.files(), BTreeMap::new());

    // Others do: what is missing or damaged there is put anew.
    let damaged = put.keys().find(|file| file.ends_with(FILES[1])).unwrap();
    let mut bytes = put[damaged].clone();
    bytes[9] ^= 1;
    store.write(damaged, &bytes);
    project.edit("pipeline.yaml", "max_tokens: 8", "max_tokens: 7");
    run(&[]).ok();
    assert_eq!(store.files(), put);
}

#[test]
fn adapters_are_put_into_a_folder_store_and_found_there() {
    let home = Project::new();
    adapters_are_found_in(Arc::new(Folder(home.path("store"))));
}

#[test]
fn adapters_are_put_into_s3_and_found_there() {
    let Some(weed) = Weed::start() else { return };
    adapters_are_found_in(Arc::new(weed));
}

#[test]
fn a_store_that_refuses_is_named_by_the_step() {
    let Some(weed) = Weed::start() else { return };
    let project = tiny::project();
    let student = format!(
        "  student:\n    provider: openai\n    base_url: http://127.0.0.1:9/v1\n    model: tiny\n    guided: vllm\n    max_retries: 0\n    adapters: {{ url: '{}' }}\n",
        Store::url(&weed)
    );
    let backend = tiny::stand_in_trainer(&project);
    tiny::train(&project, Some(&student), &backend);
    let args = ["--json", "--keep-going", "pipeline.yaml"];
    let mut command = weed.command(&project, &args);
    command.env("AWS_SECRET_ACCESS_KEY", "wrong-secret");
    let refused = Run::of(command.output().unwrap());
    assert_eq!(refused.code, Some(4), "{}", refused.stderr);
    let said = format!("{}{}", refused.stdout, refused.stderr);
    let named = format!("the remote store {} cannot be used", Store::url(&weed));
    assert!(
        said.contains("is not at its server") && said.contains(&named),
        "{said}"
    );
    assert!(!said.contains("wrong-secret"), "{said}");
    assert_eq!(Store::files(&weed), BTreeMap::new());
}
