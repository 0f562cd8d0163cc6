//! Ray Serve LLM on this machine's CPU, which loads adapters from S3 by the names in requests: what
//! the pipeline trains is put there, and answers as it does in this process. `FLOWRUN_RAY_LLM_PYTHON`
//! names a Python with `ray[serve,llm]` and vLLM, `FLOWRUN_WEED` a SeaweedFS.

use std::time::Duration;

use serde_json::{Value, json};

use crate::external::named;
use crate::ray_cluster::Ray;
use crate::ray_files::{rendered, takes};
use crate::server::{client, free_port};
use crate::tiny::{self, answers, answers_here, write_model_for_vllm};
use crate::weed::Weed;

const PACKAGES: &str = "Python with `ray[serve,llm]` and vLLM";

/// Reads a file as Ray Serve LLM does before it deploys it.
const VALIDATE: &str = "
import sys, yaml
from ray.serve.llm import LLMConfig
from ray.serve.schema import ServeDeploySchema
applications = ServeDeploySchema(**yaml.safe_load(open(sys.argv[1]))).applications
models = [model for application in applications for model in application.args['llm_configs']]
assert models
for model in models:
    LLMConfig(**model)
";

#[test]
fn the_file_for_ray_serve_llm_is_what_it_takes() {
    let Some(python) = named("FLOWRUN_RAY_LLM_PYTHON", PACKAGES) else {
        return;
    };
    let project = rendered();
    let taken = |file: &str| takes(&python, VALIDATE, &project.path(file));
    let (good, said) = taken("files/serve_llm.yaml");
    assert!(good, "{said}");
    let llm = project.read("files/serve_llm.yaml");
    for (right, wrong) in [
        ("\"s3://bucket/adapters\"", "\"/local/adapters\""),
        ("          engine_kwargs:", "          engine_arguments:"),
    ] {
        let text = llm.replace(right, wrong);
        assert_ne!(text, llm);
        project.write("files/wrong.yaml", &text);
        assert!(!taken("files/wrong.yaml").0, "{wrong} is refused");
    }
}

/// How long the model may take to come up on a busy machine.
const UP_WITHIN: Duration = Duration::from_secs(900);

/// An application that serves a model's folder on the CPU, with adapters from the bucket.
fn application(model: &str, port: u16) -> Value {
    json!({
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{
            "name": "tiny",
            "route_prefix": "/",
            "import_path": "ray.serve.llm:build_openai_app",
            "args": {"llm_configs": [{
                "model_loading_config": {"model_id": "tiny", "model_source": model},
                "accelerator_config": {"kind": "cpu"},
                "placement_group_config": {"bundles": [{"CPU": 1}]},
                "engine_kwargs": {
                    "enable_lora": true, "max_loras": 2, "max_lora_rank": 16,
                    "max_model_len": 1024, "max_num_seqs": 4, "dtype": "float32",
                    "enforce_eager": true,
                },
                "lora_config": {
                    "dynamic_lora_loading_path": "s3://flow/adapters",
                    "max_num_adapters_per_replica": 4,
                },
                "deployment_config": {
                    "num_replicas": 1, "ray_actor_options": {"num_cpus": 0.1},
                },
                "log_engine_metrics": false,
            }]},
        }],
    })
}

#[test]
fn ray_serve_llm_answers_with_adapters_that_were_put_into_s3() {
    let Some(python) = named("FLOWRUN_RAY_LLM_PYTHON", PACKAGES) else {
        return;
    };
    let Some(weed) = Weed::start() else { return };
    let text = |value: &str| value.to_owned();
    let env = [
        ("AWS_ACCESS_KEY_ID", text("RK")),
        ("AWS_SECRET_ACCESS_KEY", text("RS")),
        ("AWS_REGION", text("us-east-1")),
        ("AWS_ENDPOINT_URL", weed.endpoint()),
        ("HF_HUB_OFFLINE", text("1")),
        ("VLLM_CPU_KVCACHE_SPACE", text("1")),
        ("VLLM_CPU_OMP_THREADS_BIND", text("nobind")),
        ("VLLM_CPU_NUM_OF_RESERVED_CPU", text("0")),
        ("VLLM_NO_USAGE_STATS", text("1")),
        ("OMP_NUM_THREADS", text("2")),
    ];
    let ray = Ray::start_with(&python, &env);
    let project = tiny::project();
    write_model_for_vllm(&project.path("tiny"), 1);
    let port = free_port();
    let model = project.path("tiny").display().to_string();
    ray.serve(&application(&model, port), UP_WITHIN);

    let url = format!("http://127.0.0.1:{port}/v1");
    let student = format!(
        "  student:\n    provider: openai\n    base_url: {url}\n    model: tiny\n    guided: vllm\n    concurrency: 4\n    timeout_s: 300\n    adapters: {{ url: 's3://flow/adapters', server: vllm }}\n"
    );
    let backend = tiny::stand_in_trainer_of(&project, &tiny::FOR_VLLM);
    tiny::train(&project, Some(&student), &backend);
    // A token is a byte, and a label may be long.
    project.edit("pipeline.yaml", "max_tokens: 8", "max_tokens: 64");
    let run = weed.run(&project, &["--json", "pipeline.yaml"]).ok();
    let there = answers(&project, &run);

    // It lists what was put there, by the names by which it was asked.
    let listed = client().get(format!("{url}/models")).send().unwrap();
    let listed: Value = listed.json().unwrap();
    let ids = listed["data"].as_array().unwrap().iter();
    let mut ids: Vec<&str> = ids.map(|model| model["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    assert_eq!((ids.len(), ids[0]), (3, "tiny"), "{ids:?}");
    assert!(ids[1].starts_with("tiny:epochs-1-total-trained-steps-3-"));
    assert!(ids[2].starts_with("tiny:epochs-2-total-trained-steps-6-"));
    assert_eq!(weed.files("adapters").len(), 4);

    // The same labels as in this process.
    agree(&there, &answers_here(&project), 5, 6);

    // And what it says freely, of any letters: matrices are rounded here, which tells where two
    // letters are nearly as likely.
    project.edit("pipeline.yaml", "      constrain: true\n", "");
    project.edit("pipeline.yaml", "    guided: vllm\n", "");
    project.edit("pipeline.yaml", "max_tokens: 64", "max_tokens: 8");
    let run = weed.run(&project, &["--json", "pipeline.yaml"]).ok();
    let free = answers(&project, &run);
    agree(&free, &answers_here(&project), 1, 2);
    let said = |at: usize| -> Vec<&Value> { free[at].1.iter().map(|row| &row[0]).collect() };
    for (one, other) in [(0, 1), (0, 2), (1, 2)] {
        assert_ne!(said(one), said(other), "each answers in its own way");
    }
}

/// Whether of each checkpoint's answers so many in so many are the same.
fn agree(there: &[(String, Vec<Value>)], here: &[(String, Vec<Value>)], least: usize, of: usize) {
    assert_eq!((there.len(), here.len()), (3, 3));
    for ((name, there), (same, here)) in there.iter().zip(here) {
        assert_eq!((name, there.len()), (same, here.len()));
        let equal = there.iter().zip(here).filter(|(a, b)| a[0] == b[0]);
        assert!(
            equal.count() * of >= there.len() * least,
            "{name}: {there:?} {here:?}"
        );
    }
}
