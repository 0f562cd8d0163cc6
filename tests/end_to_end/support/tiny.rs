//! A Llama of a few kilobytes with weights out of a formula, in Hugging Face's files; and a
//! project that scores and deploys it. It knows nothing, but it is quick and always the
//! same.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::project::{Project, Run};

/// Widths of its parts.
pub(crate) struct Shape {
    hidden: usize,
    ffn: usize,
    kv: usize,
}

/// The quickest.
const SMALLEST: Shape = Shape {
    hidden: 16,
    ffn: 16,
    kv: 8,
};
/// vLLM computes no heads narrower than 32.
pub(crate) const FOR_VLLM: Shape = Shape {
    hidden: 64,
    ffn: 64,
    kv: 32,
};
const LAYERS: usize = 2;
const HEADS: usize = 2;
/// One token a byte, and the two of ChatML.
const VOCAB: usize = 258;

/// Writes a model into a folder. Other seeds are other models.
pub(crate) fn write_model(folder: &Path, seed: u64) {
    write_shaped(folder, seed, &SMALLEST);
}

/// Writes one that vLLM loads.
pub(crate) fn write_model_for_vllm(folder: &Path, seed: u64) {
    write_shaped(folder, seed, &FOR_VLLM);
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config["torch_dtype"] = json!("float32");
    config["tie_word_embeddings"] = json!(false);
    config["max_position_embeddings"] = json!(2048);
    config["bos_token_id"] = json!(256);
    config["eos_token_id"] = json!(257);
    fs::write(path, config.to_string()).unwrap();
    with_chat_template(folder);
}

/// Gives it a chat template of its own: ChatML, which it is spoken to in anyhow.
pub(crate) fn with_chat_template(model: &Path) {
    let path = model.join("tokenizer_config.json");
    let mut settings: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    settings["tokenizer_class"] = json!("PreTrainedTokenizerFast");
    settings["chat_template"] = json!(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    );
    fs::write(path, settings.to_string()).unwrap();
}

fn write_shaped(folder: &Path, seed: u64, shape: &Shape) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": shape.hidden, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "intermediate_size": shape.ffn,
        "vocab_size": VOCAB, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).unwrap();
    let settings = json!({"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"});
    fs::write(folder.join("tokenizer_config.json"), settings.to_string()).unwrap();
    fs::write(
        folder.join("model.safetensors"),
        safetensors(&weights(seed, shape)),
    )
    .unwrap();
}

/// Writes an adapter for such a model, as PEFT does.
pub(crate) fn write_adapter(folder: &Path, seed: u64) {
    write_shaped_adapter(folder, seed, &SMALLEST);
}

fn write_shaped_adapter(folder: &Path, seed: u64, shape: &Shape) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
        "r": 2, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none",
        "target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": false,
        "inference_mode": true, "init_lora_weights": true, "modules_to_save": null,
    });
    fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let mut draw = Draw(seed);
    let mut tensors = BTreeMap::new();
    for layer in 0..LAYERS {
        for (module, output, input) in [
            ("self_attn.q_proj", shape.hidden, shape.hidden),
            ("mlp.down_proj", shape.hidden, shape.ffn),
        ] {
            let name = format!("base_model.model.model.layers.{layer}.{module}");
            tensors.insert(format!("{name}.lora_A.weight"), draw.matrix(2, input, 1.0));
            tensors.insert(format!("{name}.lora_B.weight"), draw.matrix(output, 2, 1.0));
        }
    }
    fs::write(
        folder.join("adapter_model.safetensors"),
        safetensors(&tensors),
    )
    .unwrap();
}

/// A project whose pipeline scores the model and deploys it.
pub(crate) fn project() -> Project {
    let project = Project::new();
    project.copy_example("label", "data");
    write_model(&project.path("tiny"), 1);
    project.write("pipeline.yaml", PIPELINE);
    project
}

/// Puts these steps in the place of those that score the model and deploy it.
pub(crate) fn instead_of_scoring(project: &Project, steps: &str) {
    let text = project.read("pipeline.yaml");
    let (head, _) = text.split_once("  score:").unwrap();
    project.write("pipeline.yaml", &format!("{head}{steps}"));
}

/// Has the project train the student with these settings more, and score every checkpoint instead
/// of deploying. `student` takes the place of the entry of the model.
pub(crate) fn train(project: &Project, student: Option<&str>, settings: &str) {
    let old = project.read("pipeline.yaml");
    let place = |text: &str| old.find(text).unwrap();
    let (start, end, score) = (place("  student:"), place("programs:"), place("  score:"));
    let text = format!(
        "{}{}{}{}",
        &old[..start],
        student.unwrap_or(&old[start..end]),
        &old[end..score],
        TRAINED.replace("SETTINGS", settings)
    );
    project.write("pipeline.yaml", &text);
}

/// A back end that "trains" by handing over two adapters of other seeds, with plain LoRA, as TRL
/// leaves its checkpoints.
pub(crate) fn stand_in_trainer(project: &Project) -> String {
    stand_in_trainer_of(project, &SMALLEST)
}

/// The same for a model of another shape.
pub(crate) fn stand_in_trainer_of(project: &Project, shape: &Shape) -> String {
    write_shaped_adapter(&project.path("made/3"), 21, shape);
    write_shaped_adapter(&project.path("made/6"), 22, shape);
    let script = format!("ADAPTERS={}\n{TRAINER}", project.path("made").display());
    project.write("trainer.sh", &script);
    format!(
        "backend: {{ command: {{ trainer: trl, program: [sh, {}], base: some/base }} }}",
        project.path("trainer.sh").display()
    )
}

const TRAINER: &str = r#"
out=$(sed -n 's/^output_dir: //p' "$3")
for step in 3 6; do
  mkdir -p "$out/checkpoint-$step"
  cp "$ADAPTERS/$step"/* "$out/checkpoint-$step"
  echo "{\"epoch\": $((step / 3)).0, \"log_history\": [{\"step\": $step, \"epoch\": $((step / 3)).0, \"loss\": 0.5}]}" > "$out/checkpoint-$step/trainer_state.json"
done
"#;

/// What each checkpoint answered, row by row.
pub(crate) fn answers(project: &Project, run: &Run) -> Vec<(String, Vec<Value>)> {
    let mut all = Vec::new();
    for event in run.events() {
        if event["event"] == "step_finished" && event["kind"] == "evaluate" {
            let path = event["outputs"]["scores"]["path"].as_str().unwrap();
            let scores: Value = serde_json::from_str(&project.read(path)).unwrap();
            let rows = scores["programs"][0]["rows"].as_array().unwrap();
            let said = rows.iter().map(|row| json!([row["predicted"], row["raw"]]));
            all.push((scores["model"].as_str().unwrap().to_owned(), said.collect()));
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// What they answer in this process.
pub(crate) fn answers_here(project: &Project) -> Vec<(String, Vec<Value>)> {
    let old = project.read("pipeline.yaml");
    let place = |text: &str| old.find(text).unwrap();
    let local = format!(
        "{}  student: {{ provider: embedded, weights: {{ file: tiny }} }}\n{}",
        &old[..place("  student:")],
        &old[place("programs:")..]
    );
    project.write("local.yaml", &local);
    let run = project.run(&["--json", "local.yaml"]).ok();
    answers(project, &run)
}

const TRAINED: &str = r#"
  finetune:
    uses: finetune
    in: { messages: chats.messages, lineage: chats.lineage }
    with:
      model: student
      epochs: 2
      batch_size: 4
      SETTINGS
  score:
    uses: evaluate
    foreach: { adapter: [finetune.base, finetune.checkpoints] }
    in: { rows: labels.test, program: chats.program, adapter: "${{ item.adapter }}" }
    with: { model: student, sampling: { max_tokens: 8 } }
"#;

const PIPELINE: &str = "\
name: tiny
params:
  target: bundle
models:
  student:
    provider: embedded
    weights: { file: tiny }
programs:
  classify:
    predict:
      adapter: compact
      instructions: Classify the bank customer's query by intent.
      inputs:
        - name: text
      outputs:
        - name: label
          type: label
      constrain: true
steps:
  load:
    uses: load
    with:
      name: queries
      train: { file: data/known.csv }
      test: { file: data/queries.csv }
  labels:
    uses: filter-top-n
    in: { train: load.train, test: load.test }
    with: { n: 3 }
  chats:
    uses: convert-to-messages
    in: { rows: [labels.train], labels: labels.labels }
    with: { program: classify }
  score:
    uses: evaluate
    in: { rows: labels.test, program: chats.program }
    with: { model: student }
  deploy:
    uses: deploy
    in: { program: chats.program, scores: score.scores }
    with:
      name: tiny
      model: student
      target: ${{ params.target }}
    publish: { bundle: bundle }
";

fn weights(seed: u64, shape: &Shape) -> BTreeMap<String, Matrix> {
    let mut draw = Draw(seed);
    let Shape { hidden, ffn, kv } = *shape;
    let mut all = BTreeMap::new();
    all.insert(
        "model.embed_tokens.weight".to_owned(),
        draw.matrix(VOCAB, hidden, 1.0),
    );
    for layer in 0..LAYERS {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        all.insert(name("input_layernorm"), ones(hidden));
        all.insert(name("post_attention_layernorm"), ones(hidden));
        for (part, output, input) in [
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", ffn, hidden),
            ("mlp.up_proj", ffn, hidden),
            ("mlp.down_proj", hidden, ffn),
        ] {
            all.insert(name(part), draw.matrix(output, input, 0.8));
        }
    }
    all.insert("model.norm.weight".to_owned(), ones(hidden));
    // It says letters and spaces alone, and never ends by itself.
    let mut head = draw.matrix(VOCAB, hidden, 2.0);
    for token in 0..VOCAB {
        let letter =
            token == usize::from(b' ') || (token < 256 && (token as u8).is_ascii_lowercase());
        if !letter {
            head.values[token * hidden..][..hidden].fill(0.0);
        }
    }
    all.insert("lm_head.weight".to_owned(), head);
    all
}

struct Matrix {
    shape: Vec<usize>,
    values: Vec<f32>,
}

fn ones(width: usize) -> Matrix {
    Matrix {
        shape: vec![width],
        values: vec![1.0; width],
    }
}

/// Numbers from -1 to 1 (splitmix64).
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn matrix(&mut self, rows: usize, columns: usize, size: f32) -> Matrix {
        let scale = size * 2.0 / (columns as f32).sqrt();
        Matrix {
            shape: vec![rows, columns],
            values: (0..rows * columns).map(|_| self.next() * scale).collect(),
        }
    }
}

fn safetensors(tensors: &BTreeMap<String, Matrix>) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, matrix) in tensors {
        let start = data.len();
        data.extend(matrix.values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = json!({
            "dtype": "F32", "shape": matrix.shape, "data_offsets": [start, data.len()],
        });
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), &data].concat()
}

/// Bytes as tokens, in the spelling of GPT-2's vocabulary.
fn tokenizer() -> Value {
    let mut vocab = serde_json::Map::new();
    let mut others = 256u32;
    for byte in 0..=255u8 {
        let plain = matches!(byte, 33..=126 | 161..=172 | 174..=255);
        let spelled = if plain {
            char::from(byte)
        } else {
            others += 1;
            char::from_u32(others - 1).unwrap()
        };
        vocab.insert(spelled.to_string(), json!(byte));
    }
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "added_tokens": [special(256, "<|im_start|>"), special(257, "<|im_end|>")],
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}
