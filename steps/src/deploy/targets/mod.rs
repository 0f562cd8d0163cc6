//! What a bundle needs to run elsewhere: files rendered from templates. One file a target, and
//! [`TARGETS`], the visible list of them.
//!
//! Invariant: rendering reads the bundle and the weights that it names (which are fetched where they
//! are not at hand) and writes nothing else; equal bundles and settings give equal files. What is
//! known to be wrong (a name that a target cannot take, a model that it cannot load) is an error here
//! and not at the target. Weights that a bundle only names come along where the target can fetch
//! nothing, which is so in containers; elsewhere the files say that they are fetched.

mod docker;
mod hugging_face;
mod kubernetes;
mod plain;
mod ray_serve;
mod systemd;
mod vllm;
mod weights;

#[cfg(test)]
mod tests;
#[cfg(all(test, feature = "model"))]
mod token_ids;

use std::path::{Path, PathBuf};

use flowrun_engine::step::{StepError, World};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bundle::{Bundle, Manifest};
use crate::folder;
use crate::models::{ModelSpec, encoder_spec};
use crate::program_file::ProgramFile;

/// How a bundle is to run elsewhere.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Port to serve on.
    pub port: u16,
    /// Container image, with its tag or digest.
    pub image: Option<String>,
    /// Kubernetes: the namespace.
    pub namespace: Option<String>,
    /// Copies that always run.
    #[schemars(range(min = 1))]
    pub replicas: u32,
    /// Copies at most, when there is much to do.
    #[schemars(range(min = 1))]
    pub max_replicas: u32,
    /// Cores of a copy, in Kubernetes' words.
    #[schemars(regex(pattern = "^[0-9]+(\\.[0-9]+)?m?$"))]
    pub cpu: String,
    /// Memory of a copy, in Kubernetes' words.
    #[schemars(regex(pattern = "^[0-9]+(Ki|Mi|Gi)$"))]
    pub memory: String,
    /// The base model as vLLM and Ray load it: a repository of the Hugging Face hub, or a folder.
    /// Needed where the bundle's weights are no such thing (a GGUF file).
    pub base_model: Option<String>,
    /// Ray Serve: this program on the nodes.
    pub program: String,
    /// Ray Serve LLM: where adapters are loaded from, `s3://…` or `gs://…`.
    pub adapters_url: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 8000,
            image: None,
            namespace: None,
            replicas: 2,
            max_replicas: 4,
            cpu: "2".to_owned(),
            memory: "2Gi".to_owned(),
            base_model: None,
            program: "flowrun".to_owned(),
            adapters_url: None,
        }
    }
}

/// A target that files are rendered for.
pub struct Target {
    /// Its name, kebab-case.
    pub name: &'static str,
    /// What comes of it.
    pub about: &'static str,
    render: fn(&Facts<'_>) -> Result<Vec<File>, StepError>,
}

/// All of them.
pub const TARGETS: [Target; 7] = [
    vllm::TARGET,
    ray_serve::TARGET,
    kubernetes::TARGET,
    docker::COMPOSE,
    docker::DOCKERFILE,
    systemd::TARGET,
    hugging_face::TARGET,
];

/// A file of a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Where, in the target's folder.
    pub path: PathBuf,
    /// What is in it.
    pub content: Content,
}

/// What is in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A text.
    Text(String),
    /// A program's text: it may be executed.
    Script(String),
    /// What another file or folder holds.
    CopyOf(PathBuf),
}

/// What templates know.
struct Facts<'a> {
    bundle: &'a Bundle,
    settings: &'a Settings,
    world: &'a World,
}

/// Renders a target's files.
///
/// # Errors
/// Invalid when the bundle cannot run there, or a setting is missing.
pub fn render(
    name: &str,
    bundle: &Bundle,
    settings: &Settings,
    world: &World,
) -> Result<Vec<File>, StepError> {
    let target = TARGETS.iter().find(|target| target.name == name);
    let target = target.ok_or_else(|| {
        let names = TARGETS.iter().map(|target| target.name);
        let names: Vec<&str> = names.collect();
        StepError::invalid(format!("there is no target `{name}`"))
            .help(format!("there are {}", names.join(", ")))
    })?;
    (target.render)(&Facts {
        bundle,
        settings,
        world,
    })
}

/// Writes files into `folder`, which is made.
///
/// # Errors
/// When a file cannot be read or written.
pub fn write(files: &[File], folder: &Path) -> Result<(), StepError> {
    use std::os::unix::fs::PermissionsExt as _;
    for file in files {
        let path = folder.join(&file.path);
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent).map_err(|e| StepError::io(parent, &e))?;
        let io = |e: std::io::Error| StepError::io(&path, &e);
        match &file.content {
            Content::Text(text) => std::fs::write(&path, text).map_err(io)?,
            Content::Script(text) => {
                std::fs::write(&path, text).map_err(io)?;
                let mode = std::fs::Permissions::from_mode(0o755);
                std::fs::set_permissions(&path, mode).map_err(io)?;
            }
            Content::CopyOf(from) => folder::copy(from, &path)?,
        }
    }
    Ok(())
}

/// What stands between quotes in scripts and YAML.
///
/// # Errors
/// Invalid when it would end them, or be read as more than a text.
fn plain(name: &str, text: &str) -> Result<(), StepError> {
    let odd = |c: char| c.is_control() || "'\"`$\\".contains(c);
    match text.is_empty() || text.chars().any(odd) {
        true => Err(StepError::invalid(format!(
            "{name}: `{text}` cannot stand in the target's files; it has no quotes, `$` or `\\`"
        ))),
        false => Ok(()),
    }
}

/// A name as a DNS label.
///
/// # Errors
/// Invalid when it has none.
pub(super) fn dns_name(name: &str) -> Result<String, StepError> {
    let name: String = name.replace(['.', '_'], "-");
    let name = name.trim_end_matches('-').to_owned();
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 50 || !name.chars().all(fits) || name.starts_with('-') {
        return Err(StepError::invalid(format!(
            "`{name}` is no name for a service: it has 1 to 50 lower-case letters, digits and `-`"
        ))
        .help("choose another `name` of `deploy`"));
    }
    Ok(name)
}

fn text(path: &str, content: String) -> File {
    File {
        path: path.into(),
        content: Content::Text(content),
    }
}

fn script(path: &str, content: String) -> File {
    File {
        path: path.into(),
        content: Content::Script(content),
    }
}

impl Facts<'_> {
    fn manifest(&self) -> &Manifest {
        &self.bundle.manifest
    }

    /// Fills in a template; `more` adds to what it knows.
    fn fill(
        &self,
        template: &str,
        more: &[(&str, serde_json::Value)],
    ) -> Result<String, StepError> {
        let manifest = self.manifest();
        let mut context = tera::Context::new();
        context.insert("name", &manifest.name);
        context.insert("model_id", &manifest.model_id);
        context.insert("measured", &manifest.measured);
        context.insert("settings", self.settings);
        context.insert("key", super::API_KEY);
        context.insert("version", env!("CARGO_PKG_VERSION"));
        for (name, value) in more {
            context.insert(*name, value);
        }
        // Values are quoted where they are put: no target speaks HTML.
        tera::Tera::one_off(template, &context, false)
            .map_err(|e| StepError::failed(format!("a template of `deploy`: {e:?}")))
    }

    /// The name as a DNS label, which most targets want.
    fn dns_name(&self) -> Result<String, StepError> {
        dns_name(&self.manifest().name)
    }

    /// The container image.
    fn image(&self) -> Result<String, StepError> {
        match &self.settings.image {
            Some(image) if image.chars().any(char::is_whitespace) => Err(StepError::invalid(
                format!("`image`: `{image}` is no image"),
            )),
            Some(image) => plain("`image`", image).map(|()| image.clone()),
            None => Ok(format!(
                "{}:{}",
                self.dns_name()?,
                env!("CARGO_PKG_VERSION")
            )),
        }
    }

    /// The base model as others than this program load it, and its id.
    fn base_model(&self, target: &str) -> Result<(String, String), StepError> {
        let manifest = self.manifest();
        let named = self.settings.base_model.clone();
        let base = match &manifest.model {
            Some(ModelSpec::Embedded(spec)) => {
                let weights = &spec.weights;
                let hub = weights.hf.clone().filter(|_| weights.file.is_none());
                named.or(hub).ok_or_else(|| {
                    StepError::invalid(format!(
                        "`{target}` cannot load the weights `{}`",
                        weights.name()
                    ))
                    .help("set `settings.base_model` to the model on the Hugging Face hub that they were made from, or to its folder")
                })?
            }
            // A server that takes adapters usually calls its base model what it loads it by.
            Some(ModelSpec::OpenAi(spec)) if spec.adapters.is_some() => {
                if manifest.model_id != spec.model && self.bundle.adapter()?.is_none() {
                    return Err(StepError::invalid(format!(
                        "`{target}` cannot load `{}`: only its server has it",
                        manifest.model_id
                    ))
                    .help("choose the target `bundle`: it asks that server"));
                }
                named.unwrap_or_else(|| spec.model.clone())
            }
            _ => {
                return Err(StepError::invalid(format!(
                    "`{target}` serves a model, and this bundle has none of its own"
                ))
                .help("deploy a program that asks a `provider: embedded` model, or one of a server with `adapters`"));
            }
        };
        // Ray and vLLM split an adapter's id at the first colon.
        let id = match manifest.model_id.split_once(':') {
            Some((base, _)) => base.to_owned(),
            None => manifest.model_id.clone(),
        };
        plain("base_model", &base)?;
        plain("the model's id", &manifest.model_id)?;
        Ok((base, id))
    }

    /// Rank of the adapter, if there is one.
    fn rank(&self) -> Result<Option<u64>, StepError> {
        let Some(folder) = self.bundle.adapter()? else {
            return Ok(None);
        };
        let config: serde_json::Value =
            crate::rows::read_json(&folder.join("adapter_config.json"))?;
        config["r"]
            .as_u64()
            .map(Some)
            .ok_or_else(|| StepError::invalid("the adapter's config has no rank `r`".to_owned()))
    }

    /// A bundle whose program asks the model at `base_url` instead of one of its own: the program
    /// in front of another server.
    fn gateway(&self, base_url: &str) -> Result<Vec<File>, StepError> {
        let mut entry = serde_json::json!({
            "provider": "openai", "base_url": base_url, "model": self.manifest().model_id,
            "guided": "vllm",
        });
        // A server's model is asked as it was when it was scored.
        if let Some(ModelSpec::OpenAi(spec)) = &self.manifest().model {
            entry["guided"] = serde_json::json!(spec.guided);
            entry["body"] = serde_json::json!(spec.body);
        }
        // There is no checkpoint beside it that would say so.
        let told = self.bundle.template_arguments()?;
        if !told.is_empty() {
            entry["chat_template_kwargs"] = serde_json::json!(told);
        }
        let model: ModelSpec =
            serde_json::from_value(entry).map_err(|e| StepError::failed(e.to_string()))?;
        let manifest = Manifest {
            model: Some(model),
            ..self.manifest().clone()
        };
        let json = serde_json::to_string_pretty(&manifest)
            .map_err(|e| StepError::failed(e.to_string()))?;
        let copy = |name: &str| File {
            path: Path::new("gateway").join(name),
            content: Content::CopyOf(self.bundle.folder.join(name)),
        };
        let mut files = vec![
            text("gateway/bundle.json", json + "\n"),
            copy("program.json"),
            copy("smoke.jsonl"),
        ];
        files.extend(self.encoders()?);
        Ok(files)
    }

    /// Files of the bundle that the encoders of the program's demos need, for the gateway.
    fn encoders(&self) -> Result<Vec<File>, StepError> {
        let ProgramFile::Prompt(program) = &self.bundle.program else {
            return Ok(Vec::new());
        };
        let mut files = Vec::new();
        for neighbours in program.neighbours.values() {
            let encoder = encoder_spec(&neighbours.embedder)?;
            let parts = [&encoder.weights, &encoder.tokenizer];
            for part in parts.into_iter().chain(&encoder.config) {
                let inside = part
                    .file
                    .as_ref()
                    .filter(|_| part.pip.is_none() && part.hf.is_none());
                files.extend(inside.map(|inside| File {
                    path: Path::new("gateway").join(inside),
                    content: Content::CopyOf(self.bundle.folder.join(inside)),
                }));
            }
        }
        Ok(files)
    }
}
