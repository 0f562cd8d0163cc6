//! Adapters as PEFT files: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Knows no training. Invariant: what is read fits the given model, tensor by tensor; a setting
//! that changes what the adapter computes and that this crate does not compute is an error,
//! never ignored.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use super::{LayerNames, LoraAdapter, LoraConfig, LoraPair, Module};
use crate::config::LlamaConfig;
use crate::error::ModelError;
use crate::kernels::View;

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Settings that may have any value: they name things, or matter only before or while training.
const HARMLESS: [&str; 9] = [
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "megatron_core",
    "peft_version",
    "revision",
    "task_type",
    "layers_to_transform",
    "layers_pattern",
];

impl LoraAdapter {
    /// Writes the two files into `dir`, which is made if it is missing, with the names of a text
    /// model's layers. `base` is the name of the base model that PEFT and vLLM show and may load.
    /// Each file is replaced as a whole, the config last.
    ///
    /// # Errors
    /// [`ModelError::Io`] naming the file.
    pub fn save(&self, dir: &Path, base: &str) -> Result<(), ModelError> {
        self.save_as(dir, base, LayerNames::Text)
    }

    /// The same with other names of the layers.
    ///
    /// # Errors
    /// As [`LoraAdapter::save`].
    pub fn save_as(&self, dir: &Path, base: &str, names: LayerNames) -> Result<(), ModelError> {
        fs::create_dir_all(dir).map_err(ModelError::io(dir))?;
        replace(&dir.join(WEIGHTS_FILE), &self.weights_file(names)?)?;
        let config = format!("{:#}\n", self.peft_config(base, names));
        replace(&dir.join(CONFIG_FILE), config.as_bytes())
    }

    /// Reads an adapter for `model` from a folder that PEFT or [`LoraAdapter::save`] wrote.
    ///
    /// # Errors
    /// [`ModelError::Io`] when a file cannot be read; [`ModelError::Format`] naming the file and
    /// the setting or tensor that is missing, unknown, of another shape, or not supported.
    pub fn load(dir: &Path, model: &LlamaConfig) -> Result<Self, ModelError> {
        let path = dir.join(CONFIG_FILE);
        let text = fs::read(&path).map_err(ModelError::io(&path))?;
        let refuse = |reason: String| ModelError::format(&path, reason);
        let settings: Map<String, Value> =
            serde_json::from_slice(&text).map_err(|e| refuse(e.to_string()))?;
        let mut config = read_config(&settings).map_err(refuse)?;

        let path = dir.join(WEIGHTS_FILE);
        let bytes = fs::read(&path).map_err(ModelError::io(&path))?;
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)
            .map_err(|e| ModelError::format(&path, e))?;
        let layers =
            read_layers(tensors, &config, model).map_err(|r| ModelError::format(&path, r))?;
        let has = |module: &Module| layers.iter().any(|layer| layer.contains_key(module.name()));
        let modules = Module::ALL.into_iter().filter(has);
        config.target_modules = modules.map(|m| m.name().to_owned()).collect();
        Ok(Self { config, layers })
    }

    /// The weights file with the names of a text model's layers: equal for equal values.
    #[cfg(test)]
    pub(crate) fn to_safetensors(&self) -> Result<Vec<u8>, ModelError> {
        self.weights_file(LayerNames::Text)
    }

    /// The weights file: f32, PEFT's names, the same bytes for the same values.
    fn weights_file(&self, names: LayerNames) -> Result<Vec<u8>, ModelError> {
        let mut data = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            for module in Module::ALL {
                let Some(pair) = layer.get(module.name()) else {
                    continue;
                };
                for (factor, tensor) in [("lora_A", &pair.a), ("lora_B", &pair.b)] {
                    let values = tensor.flatten_all()?.to_vec1::<f32>()?;
                    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                    let name = tensor_name(names, index, module, factor);
                    data.push((name, tensor.dims().to_vec(), bytes));
                }
            }
        }
        let views = data.iter().map(|(name, shape, bytes)| {
            TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes).map(|view| (name, view))
        });
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        views
            .collect::<Result<Vec<_>, _>>()
            .and_then(|views| safetensors::serialize(views, Some(metadata)))
            .map_err(|e| ModelError::Adapter(format!("cannot be written as safetensors: {e}")))
    }

    fn peft_config(&self, base: &str, names: LayerNames) -> Value {
        let mut config = json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": number(self.config.alpha),
            "lora_dropout": self.config.dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.config.rank,
            "rank_pattern": {},
            "revision": null,
            "target_modules": names.target_modules(&self.config.target_modules),
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": false,
        });
        // Only where it is used: older versions of PEFT refuse a setting that they do not know.
        if let Some(tokens) = &self.config.invocation_tokens {
            config["alora_invocation_tokens"] = json!(tokens);
        }
        config
    }
}

/// A whole number without a fraction, as PEFT types `lora_alpha`.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn tensor_name(names: LayerNames, layer: usize, module: Module, factor: &str) -> String {
    let (prefix, block, name) = (names.prefix(), module.block(), module.name());
    format!("{prefix}{layer}.{block}.{name}.{factor}.weight")
}

/// Layer, module and whether it is the `a` factor.
fn parse_name(name: &str) -> Option<(usize, Module, bool)> {
    let (layer, rest) = LayerNames::strip(name)?.split_once('.')?;
    let rest = rest.strip_suffix(".weight")?;
    let (path, factor) = rest.rsplit_once('.')?;
    let (block, module) = path.split_once('.')?;
    let module = Module::from_name(module).filter(|m| m.block() == block)?;
    let is_a = match factor {
        "lora_A" => true,
        "lora_B" => false,
        _ => return None,
    };
    Some((layer.parse().ok()?, module, is_a))
}

fn read_config(settings: &Map<String, Value>) -> Result<LoraConfig, String> {
    for (key, value) in settings {
        check_setting(key, value)?;
    }
    let get = |key: &str| settings.get(key).ok_or(format!("`{key}` is missing"));
    let rank = get("r")?.as_u64().filter(|r| *r > 0);
    let rank = rank.ok_or("`r` is not a positive whole number")? as usize;
    let alpha = get("lora_alpha")?.as_f64();
    let mut alpha = alpha.ok_or("`lora_alpha` is not a number")?;
    if settings.get("use_rslora") == Some(&Value::Bool(true)) {
        // Rank-stabilised scaling is `alpha / √r`; ours is `alpha / r`.
        alpha *= (rank as f64).sqrt();
    }
    // Computed with in f32.
    if !((alpha / rank as f64) as f32).is_finite() {
        return Err(format!("`lora_alpha` {alpha} is no number to compute with"));
    }
    get("peft_type")?;
    Ok(LoraConfig {
        rank,
        alpha,
        dropout: settings
            .get("lora_dropout")
            .and_then(Value::as_f64)
            .unwrap_or(0.0),
        target_modules: Vec::new(),
        invocation_tokens: read_invocation(settings)?,
    })
}

fn read_invocation(settings: &Map<String, Value>) -> Result<Option<Vec<u32>>, String> {
    let Some(value) = settings.get("alora_invocation_tokens") else {
        return Ok(None);
    };
    let tokens: Option<Vec<u32>> = serde_json::from_value(value.clone())
        .map_err(|_| "`alora_invocation_tokens` is not a list of tokens")?;
    match tokens {
        Some(tokens) if tokens.is_empty() => Err("`alora_invocation_tokens` is empty".to_owned()),
        tokens => Ok(tokens),
    }
}

/// Refuses a setting that changes the computation in a way that this crate lacks.
fn check_setting(key: &str, value: &Value) -> Result<(), String> {
    let neutral = match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    };
    if neutral || HARMLESS.contains(&key) {
        return Ok(());
    }
    let text = value.as_str();
    let reason = match key {
        "r" | "lora_alpha" | "lora_dropout" | "use_rslora" | "alora_invocation_tokens" => {
            return Ok(());
        }
        "peft_type" if text == Some("LORA") => return Ok(()),
        "peft_type" => "only `LORA` adapters are supported",
        "bias" if text == Some("none") => return Ok(()),
        "bias" => "trained biases are not supported",
        // The tensors themselves say which modules are adapted.
        "target_modules" => return Ok(()),
        "init_lora_weights" => match text {
            None | Some("gaussian" | "eva" | "orthogonal" | "mica") => return Ok(()),
            Some(_) => "this way to start changes the base weights; convert it with PEFT first",
        },
        "use_dora" => "weight-decomposed adapters (DoRA) are not supported",
        "rank_pattern" | "alpha_pattern" => "one rank and alpha for all modules is needed",
        "modules_to_save" => "modules that are trained in full are not supported",
        "fan_in_fan_out" => "transposed weights are not supported",
        // Settings of a start that has ended; they say nothing about the tensors.
        "loftq_config" | "eva_config" | "megatron_config" => return Ok(()),
        "qalora_group_size" => return Ok(()),
        _ => "this setting is not known, so the adapter may compute something else",
    };
    Err(format!("`{key}: {value}`: {reason}"))
}

fn read_layers(
    tensors: HashMap<String, Tensor>,
    config: &LoraConfig,
    model: &LlamaConfig,
) -> Result<Vec<BTreeMap<String, LoraPair>>, String> {
    let mut found = BTreeMap::<(usize, Module), (Option<Tensor>, Option<Tensor>)>::new();
    for (name, tensor) in tensors {
        let Some((layer, module, is_a)) = parse_name(&name) else {
            return Err(format!("tensor `{name}` is not a LoRA factor of a Llama"));
        };
        if layer >= model.layers {
            let layers = model.layers;
            return Err(format!(
                "tensor `{name}`: the base model has only {layers} layers"
            ));
        }
        let expected = match is_a {
            true => [config.rank, module.input(model)],
            false => [module.output(model), config.rank],
        };
        if tensor.dims() != expected {
            let shape = tensor.dims();
            return Err(format!(
                "tensor `{name}` has shape {shape:?}, the base model needs {expected:?}"
            ));
        }
        let tensor = tensor
            .to_dtype(DType::F32)
            .map_err(|e| format!("tensor `{name}`: {e}"))?;
        let values = View::new(&tensor).map_err(|e| format!("tensor `{name}`: {e}"))?;
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(format!(
                "tensor `{name}` has the value {value}; the training that made it went wrong"
            ));
        }
        drop(values);
        let pair = found.entry((layer, module)).or_default();
        let factor = if is_a { &mut pair.0 } else { &mut pair.1 };
        if factor.replace(tensor).is_some() {
            return Err(format!("tensor `{name}` is there under two names"));
        }
    }
    if found.is_empty() {
        return Err("it has no tensor".to_owned());
    }
    let mut layers = vec![BTreeMap::new(); model.layers];
    for ((layer, module), pair) in found {
        let (Some(a), Some(b)) = pair else {
            let name = tensor_name(LayerNames::Text, layer, module, "lora_?");
            return Err(format!("of `{name}` only one of A and B is there"));
        };
        layers[layer].insert(module.name().to_owned(), LoraPair { a, b });
    }
    Ok(layers)
}

/// Writes beside the target and renames, so that a reader sees the old file or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), ModelError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    let write = || {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(ModelError::io(path)).inspect_err(|_| {
        // The first error is the one to report; a left-over file does no harm.
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::lora::names::PREFIXES;
    use crate::train::tiny;

    fn lora() -> LoraConfig {
        LoraConfig {
            rank: 3,
            alpha: 6.0,
            target_modules: vec!["q_proj".to_owned(), "down_proj".to_owned()],
            ..LoraConfig::default()
        }
    }

    fn saved() -> (tempfile::TempDir, LoraAdapter) {
        let folder = tempfile::tempdir().unwrap();
        let adapter = tiny::adapter(&lora(), &tiny::config(), 1);
        adapter.save(folder.path(), "some/base").unwrap();
        (folder, adapter)
    }

    /// The error of loading after `change` was made to the config.
    fn refused(change: impl Fn(&mut Map<String, Value>)) -> String {
        let (folder, _) = saved();
        let path = folder.path().join(CONFIG_FILE);
        let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let error = LoraAdapter::load(folder.path(), &tiny::config()).unwrap_err();
        error.to_string()
    }

    #[test]
    fn an_adapter_survives_its_files() {
        let (folder, adapter) = saved();
        let back = LoraAdapter::load(folder.path(), &tiny::config()).unwrap();
        assert_eq!(back.config, adapter.config);
        assert_eq!(
            back.to_safetensors().unwrap(),
            adapter.to_safetensors().unwrap()
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_files_are_what_peft_writes() {
        let (folder, _) = saved();
        let bytes = fs::read(folder.path().join(WEIGHTS_FILE)).unwrap();
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        let mut names: Vec<String> = header.tensors().into_keys().collect();
        names.sort();
        assert_eq!(
            names[..2],
            [
                "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight",
                "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"
            ]
        );
        assert_eq!(
            names[2],
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
        );
        let text = fs::read_to_string(folder.path().join(CONFIG_FILE)).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["peft_type"], "LORA");
        assert_eq!(config["task_type"], "CAUSAL_LM");
        assert_eq!(config["lora_alpha"], 6);
        assert_eq!(config["r"], 3);
        assert_eq!(config["base_model_name_or_path"], "some/base");
    }

    #[test]
    fn what_a_newer_peft_adds_is_read_while_it_is_off() {
        let (folder, _) = saved();
        let path = folder.path().join(CONFIG_FILE);
        let mut config: Map<String, Value> =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.insert("lora_bias".to_owned(), json!(false));
        config.insert("trainable_token_indices".to_owned(), Value::Null);
        config.insert("loftq_config".to_owned(), json!({}));
        config.insert("peft_version".to_owned(), json!("0.21.2"));
        config.insert("use_rslora".to_owned(), json!(true));
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let back = LoraAdapter::load(folder.path(), &tiny::config()).unwrap();
        assert!((back.scale() - 6.0 / 3f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn settings_that_change_the_computation_are_refused() {
        let with = |key: &'static str, value: Value| {
            refused(move |config| {
                config.insert(key.to_owned(), value.clone());
            })
        };
        assert!(with("use_dora", json!(true)).contains("`use_dora: true`: weight-decomposed"));
        assert!(with("bias", json!("all")).contains("trained biases"));
        assert!(with("peft_type", json!("IA3")).contains("only `LORA`"));
        assert!(with("rank_pattern", json!({"q_proj": 4})).contains("one rank"));
        assert!(with("init_lora_weights", json!("pissa")).contains("changes the base weights"));
        assert!(with("brand_new", json!(2)).contains("`brand_new: 2`: this setting is not known"));
        assert!(with("r", json!(4)).contains("the base model needs"));
        let missing = refused(|config| {
            config.remove("r");
        });
        assert!(missing.contains("`r` is missing"), "{missing}");
    }

    #[test]
    fn an_adapter_of_a_model_with_a_picture_part_is_read_by_its_other_names() {
        let (folder, adapter) = saved();
        let path = folder.path().join(WEIGHTS_FILE);
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let [text, others @ ..] = PREFIXES;
        let renamed = |name: &str, to: &str| name.replace(text, to);
        for other in others {
            let all = tensors.iter();
            let all = all.map(|(name, tensor)| (renamed(name, other), tensor.clone()));
            let all: HashMap<String, Tensor> = all.collect();
            candle_core::safetensors::save(&all, &path).unwrap();
            let back = LoraAdapter::load(folder.path(), &tiny::config()).unwrap();
            assert_eq!(
                back.to_safetensors().unwrap(),
                adapter.to_safetensors().unwrap()
            );
            let both: HashMap<String, Tensor> = all.into_iter().chain(tensors.clone()).collect();
            candle_core::safetensors::save(&both, &path).unwrap();
            let error = LoraAdapter::load(folder.path(), &tiny::config()).unwrap_err();
            assert!(error.to_string().contains("two names"), "{error}");
        }
    }

    #[test]
    fn an_adapter_for_a_model_with_a_picture_part_is_written_with_its_names() {
        let (_, adapter) = saved();
        let folder = tempfile::tempdir().unwrap();
        let names = LayerNames::BesidePictures;
        adapter.save_as(folder.path(), "some/base", names).unwrap();
        let path = folder.path().join(WEIGHTS_FILE);
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        let q = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight";
        assert!(tensors.contains_key(q));
        assert!(tensors.keys().all(|name| name.starts_with(names.prefix())));
        let config = fs::read(folder.path().join(CONFIG_FILE)).unwrap();
        let config: Value = serde_json::from_slice(&config).unwrap();
        // No module of the picture part, which has a `q_proj` too.
        assert_eq!(
            config["target_modules"],
            r".*\.language_model\.layers\.\d+\.\w+\.(q_proj|down_proj)"
        );
        let back = LoraAdapter::load(folder.path(), &tiny::config()).unwrap();
        assert_eq!(back.config, adapter.config);
        assert_eq!(
            back.to_safetensors().unwrap(),
            adapter.to_safetensors().unwrap()
        );
    }

    #[test]
    fn numbers_that_would_make_every_answer_nonsense_are_refused() {
        let error = refused(|config| {
            config.insert("lora_alpha".to_owned(), json!(1e300));
        });
        assert!(error.contains("`lora_alpha`"), "{error}");
        let (folder, mut adapter) = saved();
        let pair = adapter.layers[1].get_mut("q_proj").unwrap();
        pair.b = (&pair.b * f64::NAN).unwrap();
        adapter.save(folder.path(), "some/base").unwrap();
        let error = LoraAdapter::load(folder.path(), &tiny::config()).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("layers.1.self_attn.q_proj.lora_B")
        );
    }

    #[test]
    fn an_adapter_of_another_model_is_refused() {
        let (folder, _) = saved();
        let small = LlamaConfig {
            layers: 1,
            ..tiny::config()
        };
        let error = LoraAdapter::load(folder.path(), &small).unwrap_err();
        assert!(error.to_string().contains("has only 1 layers"), "{error}");
        let wide = LlamaConfig {
            ffn: 40,
            ..tiny::config()
        };
        let error = LoraAdapter::load(folder.path(), &wide).unwrap_err();
        assert!(error.to_string().contains("down_proj.lora_A"), "{error}");
        assert!(LoraAdapter::load(&folder.path().join("no"), &wide).is_err());
    }

    #[test]
    fn damaged_weights_are_refused() {
        let (folder, _) = saved();
        let path = folder.path().join(WEIGHTS_FILE);
        let good = fs::read(&path).unwrap();
        for len in [0, 9, good.len() - 1] {
            fs::write(&path, &good[..len]).unwrap();
            assert!(LoraAdapter::load(folder.path(), &tiny::config()).is_err());
        }
    }
}
