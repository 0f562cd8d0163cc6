//! The embedded model: weights, tokenizer, Llama, LoRA, training and generation.
