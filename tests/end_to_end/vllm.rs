//! vLLM itself, on the CPU and on loopback: it labels, answers as this program's server does, and
//! takes adapters at run time; one that it forgets in mid-step is loaded again. `FLOWRUN_VLLM_PYTHON`
//! names a Python that has it; `tests/full.sh` makes one.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::external::named;
use crate::forgetful;
use crate::label_job::{all_there, project, run};
use crate::project::Project;
use crate::server::{Server, chat, client, free_port, patient_client};
use crate::tiny::{self, FOR_VLLM, answers, write_model_for_vllm};

/// How long it may take to come up: torch and its own modules are large.
const UP_WITHIN: Duration = Duration::from_secs(300);
/// How long it may take to end by itself.
const DOWN_WITHIN: Duration = Duration::from_secs(20);
const ROWS: usize = 6;

/// The server, of the model `tiny`; it ends with the test.
struct Vllm {
    child: Child,
    url: String,
    folder: tempfile::TempDir,
}

impl Vllm {
    fn start(python: &Path, model: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let log = File::create(folder.path().join("log")).unwrap();
        let port = free_port();
        // Its wheel for CPUs has no working command `vllm`.
        let child = Command::new(python)
            .args(["-m", "vllm.entrypoints.openai.api_server", "--model"])
            .arg(model)
            .args(["--served-model-name", "tiny", "--host", "127.0.0.1"])
            .args(["--port", &port.to_string(), "--dtype", "float32"])
            .args(["--max-model-len", "2048", "--max-num-seqs", "8"])
            .args(["--enforce-eager", "--enable-lora", "--max-loras", "2"])
            .args(["--max-cpu-loras", "4", "--max-lora-rank", "16"])
            .current_dir(folder.path())
            .envs([
                ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True"),
                ("VLLM_HOST_IP", "127.0.0.1"),
                ("VLLM_CPU_KVCACHE_SPACE", "1"),
                ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
                ("VLLM_CPU_NUM_OF_RESERVED_CPU", "0"),
                ("OMP_NUM_THREADS", "2"),
                ("VLLM_NO_USAGE_STATS", "1"),
                ("HF_HUB_OFFLINE", "1"),
                ("TRANSFORMERS_OFFLINE", "1"),
            ])
            .env("VLLM_CACHE_ROOT", folder.path().join("cache"))
            .env("VLLM_CONFIG_ROOT", folder.path().join("config"))
            .env_remove("VLLM_API_KEY")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap();
        let mut server = Self {
            child,
            url: format!("http://127.0.0.1:{port}"),
            folder,
        };
        server.wait();
        server
    }

    fn wait(&mut self) {
        let until = Instant::now() + UP_WITHIN;
        let health = format!("{}/health", self.url);
        let is_up = || client().get(&health).send();
        while !is_up().is_ok_and(|answer| answer.status().is_success()) {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "vLLM ended: {ended:?}\n{}", self.log());
            assert!(Instant::now() < until, "no vLLM\n{}", self.log());
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// An answer that must be 200.
    fn ask(&self, path: &str, body: &Value) -> String {
        let url = format!("{}{path}", self.url);
        let answer = patient_client().post(url).json(body).send().unwrap();
        let status = answer.status();
        let text = answer.text().unwrap();
        assert_eq!(status, 200, "{text}\n{}", self.log());
        text
    }
}

impl Drop for Vllm {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let until = Instant::now() + DOWN_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(100));
        }
        // Its engine's processes are of its group.
        let _ = killpg(pid, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// How likely the first token of an answer is, and those beside it, by their texts.
fn likely(answer: &Value) -> Vec<(String, f64)> {
    let first = &answer["choices"][0]["logprobs"]["content"][0];
    let top = first["top_logprobs"].as_array().unwrap().iter();
    let of = |token: &Value| {
        let text = token["token"].as_str().unwrap().to_owned();
        (text, token["logprob"].as_f64().unwrap())
    };
    top.map(of).collect()
}

/// How far the most likely tokens are apart at most; of one that only one of them has: very far.
fn apart(a: &[(String, f64)], b: &[(String, f64)]) -> f64 {
    let other = |text: &str| b.iter().find(|(other, _)| other == text);
    let off =
        |(text, log): &(String, f64)| other(text.as_str()).map_or(9.0, |(_, l)| (log - l).abs());
    // The last ones may be as likely as those that are not among them.
    a.iter().take(3).map(off).fold(0.0, f64::max)
}

/// Base and adapters are as likely to begin so as at this program's own server, whose weights are
/// rounded to 8 bits.
fn answers_as_ours(vllm: &Vllm, home: &Project) {
    tiny::stand_in_trainer_of(home, &FOR_VLLM);
    let mut command = home.command(&["serve", "tiny", "--adapters", "made"]);
    command.env_remove("FLOWRUN_API_KEY");
    for name in ["3", "6"] {
        let folder = home.path("made").join(name);
        // Weak enough that rounding does not turn what the model attends to.
        let config = format!("made/{name}/adapter_config.json");
        home.edit(&config, "\"lora_alpha\":32", "\"lora_alpha\":2");
        let adapter = json!({"lora_name": format!("tiny:{name}"), "lora_path": folder});
        vllm.ask("/v1/load_lora_adapter", &adapter);
    }
    let ours = Server::start(command);
    let texts = ["Where is my card?", "Change my PIN, please", "12 EUR"];
    let mut moved = 0.0f64;
    for text in texts {
        let mut base = Vec::new();
        for id in ["tiny", "tiny:3", "tiny:6"] {
            let mut body = chat(id, text, 1);
            body["logprobs"] = true.into();
            body["top_logprobs"] = 5.into();
            let theirs = vllm.ask("/v1/chat/completions", &body);
            let theirs: Value = serde_json::from_str(&theirs).unwrap();
            let answer = ours.json("/v1/chat/completions", &body);
            // The same prompt, token by token.
            let prompt = |answer: &Value| answer["usage"]["prompt_tokens"].clone();
            assert_eq!(prompt(&theirs), prompt(&answer));
            let (theirs, answer) = (likely(&theirs), likely(&answer));
            let off = apart(&theirs, &answer);
            assert!(off < 0.3, "{id}, {text}: {theirs:?} {answer:?}");
            if base.is_empty() {
                base = theirs;
            } else {
                moved = moved.max(apart(&base, &theirs));
            }
        }
    }
    assert!(moved > 0.6, "the adapters move nothing: {moved}");
    for name in ["3", "6"] {
        let name = json!({"lora_name": format!("tiny:{name}")});
        vllm.ask("/v1/unload_lora_adapter", &name);
    }
}

#[test]
fn vllm_labels_takes_adapters_and_may_forget_them() {
    let Some(python) = named("FLOWRUN_VLLM_PYTHON", "Python with vLLM") else {
        return;
    };
    let home = Project::new();
    write_model_for_vllm(&home.path("tiny"), 1);
    let vllm = Vllm::start(&python, &home.path("tiny"));

    // Labels and nothing else; a model that knows nothing would not write one by itself.
    let labelled = project(ROWS, &format!("{}/v1", vllm.url), "tiny", "");
    run(&labelled).ok();
    all_there(&labelled, ROWS);
    assert_eq!(labelled.read("dropped.jsonl"), "");

    answers_as_ours(&vllm, &home);

    let given = home.path("given");
    std::fs::create_dir_all(&given).unwrap();
    let backend = |project: &Project| tiny::stand_in_trainer_of(project, &FOR_VLLM);
    let (scored, run) = forgetful::scored(&vllm.url, "vllm", &given, backend);
    let labels = ["card_arrival", "change_pin", "exchange_rate"];
    let answers = answers(&scored, &run);
    assert_eq!(answers.len(), 3);
    for (model, rows) in answers {
        let is_label = |row: &Value| row[0].as_str().is_some_and(|l| labels.contains(&l));
        assert!(
            rows.len() > 2 && rows.iter().all(is_label),
            "{model}: {rows:?}"
        );
    }
}
