//! [`Neighbours`]: demos that are chosen for each query: the labelled rows whose inputs are most
//! like it. Knows no embedding model: vectors come through an [`Embedder`].

use std::sync::Arc;

use crate::classifier::Embedder;
use crate::example::Demo;
use crate::value::{Fields, Value};

/// Rows to choose demos from.
#[derive(Clone)]
pub struct Neighbours {
    /// Demos for each query.
    pub k: usize,
    /// The rows, by the names of the signature's fields.
    pub rows: Vec<Demo>,
    /// The vector of each row's inputs; of length 1.
    pub vectors: Vec<Vec<f32>>,
    /// Turns queries into vectors: the very encoder that made `vectors`.
    pub embedder: Option<Arc<dyn Embedder + Send + Sync>>,
}

impl std::fmt::Debug for Neighbours {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Neighbours")
            .field("k", &self.k)
            .field("rows", &self.rows.len())
            .finish_non_exhaustive()
    }
}

/// What is embedded of inputs: the only one's text, else a line `name: text` for each.
pub fn embedded_text(inputs: &Fields) -> String {
    if let [only] = inputs.values().collect::<Vec<&Value>>().as_slice() {
        return only.to_python_str();
    }
    let line = |(name, value): (&String, &Value)| format!("{name}: {}", value.to_python_str());
    inputs.iter().map(line).collect::<Vec<_>>().join("\n")
}

impl Neighbours {
    /// The demos for each query, the most similar last: what is read last counts most. Of equally
    /// similar rows the earlier ones are taken.
    ///
    /// # Errors
    /// When there is no embedder, it fails, or its vectors are of another length.
    pub(crate) fn demos_for(&self, queries: &[&Fields]) -> Result<Vec<Vec<Demo>>, String> {
        let embedder = self.embedder.as_ref().ok_or(
            "the program chooses demos by similarity, but no sentence encoder was opened for it",
        )?;
        let texts: Vec<String> = queries.iter().map(|inputs| embedded_text(inputs)).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let vectors = embedder.embed(&texts)?;
        if vectors.len() != queries.len() {
            return Err("the sentence encoder left a text without a vector".to_owned());
        }
        vectors.iter().map(|vector| self.nearest(vector)).collect()
    }

    fn nearest(&self, query: &[f32]) -> Result<Vec<Demo>, String> {
        if self
            .vectors
            .iter()
            .any(|vector| vector.len() != query.len())
        {
            return Err("the rows were embedded by another sentence encoder".to_owned());
        }
        let dot = |vector: &Vec<f32>| vector.iter().zip(query).map(|(a, b)| a * b).sum::<f32>();
        let similar: Vec<f32> = self.vectors.iter().map(dot).collect();
        let mut order: Vec<usize> = (0..self.rows.len().min(similar.len())).collect();
        order.sort_by(|a, b| similar[*b].total_cmp(&similar[*a]).then(a.cmp(b)));
        order.truncate(self.k);
        Ok(order
            .into_iter()
            .rev()
            .map(|at| self.rows[at].clone())
            .collect())
    }
}
