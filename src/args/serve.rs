//! The words of `flowrun serve`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Args as ClapArgs;
use serde_json::Value;

#[derive(Debug, ClapArgs)]
pub(crate) struct ServeArgs {
    /// A bundle's folder, made by a `deploy` step; or a base model: a GGUF file, or a folder with
    /// config.json, *.safetensors and the tokenizer's files.
    #[arg(value_name = "BUNDLE|MODEL")]
    pub(crate) target: PathBuf,
    /// Address to listen on; any but a loopback one needs FLOWRUN_API_KEY, the callers' key.
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Folder of adapters (PEFT), each a folder in it: served as `base:folder`, loaded when asked
    /// for. Repeatable. Adapters come from nowhere else.
    #[arg(long, value_name = "FOLDER")]
    pub(crate) adapters: Vec<PathBuf>,
    /// Train adapters of the base model for callers (OpenAI's fine-tuning API), and keep files,
    /// jobs and adapters in this folder. One job at a time, beside the answers
    #[arg(long, value_name = "FOLDER")]
    pub(crate) fine_tuning: Option<PathBuf>,
    /// Answer files of requests (OpenAI's Batch API), and keep requests, batches and answers in
    /// this folder. One batch at a time, beside other requests
    #[arg(long, value_name = "FOLDER")]
    pub(crate) batches: Option<PathBuf>,
    /// Adapters in memory; what was unused longest is dropped for a new one.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) max_adapters: usize,
    /// Id of a base model; its file's name when left out.
    #[arg(long, value_name = "ID")]
    pub(crate) name: Option<String>,
    /// What a base model's chat template is told besides the messages, as a JSON object:
    /// `{"enable_thinking": false}` has Qwen 3 answer at once. An adapter that knows what it was
    /// trained with is told that, and a request's own wins.
    #[arg(long, value_name = "JSON", value_parser = parse_object)]
    pub(crate) default_chat_template_kwargs: Option<BTreeMap<String, Value>>,
    /// Requests that are computed together.
    #[arg(long, value_name = "N")]
    pub(crate) max_batch: Option<usize>,
    /// Requests that wait; later ones are refused with 429.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) max_queue: usize,
    /// Seconds that an answer may take, waiting included.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub(crate) timeout: u64,
    /// Seconds that a client may take to send its request.
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    pub(crate) read_timeout: u64,
    /// Seconds that a client may take nothing of an answer that is there for it.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) write_timeout: u64,
    /// Seconds that requests under way may take once the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) drain: u64,
    /// Listen beside another server of the same user on the same port.
    #[arg(long, hide = true)]
    pub(crate) share_port: bool,
    /// Stop when stdin ends: with the process that holds its other end.
    #[arg(long, hide = true)]
    pub(crate) until_stdin_closes: bool,
}

fn parse_object(text: &str) -> Result<BTreeMap<String, Value>, String> {
    serde_json::from_str(text)
        .map_err(|e| format!("{e}; write an object, such as `{{\"enable_thinking\": false}}`"))
}
