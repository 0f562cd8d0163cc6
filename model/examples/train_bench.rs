//! Measures training speed: `train_bench MODEL.gguf [STEPS] [PREFIX] [QUERY] [TARGET] [SHARE]`.
//!
//! Rows have PREFIX common tokens, about QUERY own ones and TARGET to learn, drawn at random.
#![allow(clippy::print_stdout)]

use std::path::Path;
use std::time::Instant;

use flowrun_model::train::{Hooks, TrainConfig, TrainRow, Trainer};
use flowrun_model::{BaseModel, LoraConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().ok_or("give the path of a GGUF file")?;
    let number = |at: usize, default: usize| {
        let given = arguments.get(at).map(|text| text.parse());
        given.unwrap_or(Ok(default))
    };
    let (steps, prefix) = (number(1, 10)?, number(2, 17)?);
    let (query, target, share) = (number(3, 22)?, number(4, 16)?, number(5, 1)?);
    let start = Instant::now();
    let base = BaseModel::load(Path::new(path), "bench")?;
    println!("loaded in {:.2} s", start.elapsed().as_secs_f64());

    let mut state = 1u64;
    let mut token = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        100 + (state >> 33) as u32 % 40_000
    };
    let shared: Vec<u32> = (0..prefix).map(|_| token()).collect();
    let rows: Vec<TrainRow> = (0..8 * steps)
        .map(|row| {
            let own = (query + row % 9).saturating_sub(4).max(1);
            let mut prompt = shared.clone();
            prompt.extend((0..own).map(|_| token()));
            let target = (0..target).map(|_| token()).collect();
            TrainRow { prompt, target }
        })
        .collect();
    let config = TrainConfig {
        share_prefix: share > 0,
        ..TrainConfig::default()
    };
    let linear = 30.0 * 3_538_944.0;
    let lora = 4_884_480.0;
    let mut last = Instant::now();
    let mut times = Vec::new();
    let hooks = Hooks::default().on_step(|s| {
        let took = last.elapsed().as_secs_f64();
        last = Instant::now();
        let flops = s.tokens as f64 * (4.0 * linear + 6.0 * lora)
            + s.targets as f64 * 4.0 * 49_152.0 * 576.0;
        times.push(took);
        println!(
            "step {:3} loss {:7.4} tokens {:5} {:6.3} s/step {:6.4} s/example {:6.1} GFLOP/s",
            s.step,
            s.loss,
            s.tokens,
            took,
            took / 8.0,
            flops / took / 1e9
        );
    });
    Trainer::new(&base.weights, LoraConfig::default(), config, &rows)?.run(hooks)?;
    times.sort_by(f64::total_cmp);
    println!("median {:.4} s/example", times[times.len() / 2] / 8.0);
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status
        .lines()
        .filter(|l| l.starts_with("VmHWM") || l.starts_with("VmRSS"))
    {
        println!("{line}");
    }
    Ok(())
}
