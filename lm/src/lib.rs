//! Prompting programs: signatures, adapters, programs, metrics, evaluation, optimizers, and the language-model client.
