//! `epsmoe models`.

use crate::output;
use anyhow::Result;
use epsmoe_model::Architecture;

/// What is said of all of them.
const NOTES: &str = "\
Weights may be safetensors in bfloat16, float16, float32, FP8, MXFP4, NVFP4, INT4, INT8, AWQ or GPTQ, or a GGUF file of \
an architecture that has a name there. Text only: parts of a checkpoint that predict further tokens or see images are \
passed over, and that is said. Each architecture has tiny checkpoints in `fixtures/`: in float32 its logits are within \
0.001 of the reference and its greedy tokens the same, for every strategy, on 1, 2 and 4 ranks, in stages and chunks, \
cached or computed anew.";

/// Prints the table, which the README has too.
pub(crate) fn run() -> Result<()> {
    let mut text = String::from("| architecture | models | held against | in GGUF |\n|---|---|---|---|\n");
    for architecture in Architecture::ALL {
        let (models, judge) = (architecture.models(), architecture.judge());
        let gguf = architecture.gguf().unwrap_or("");
        text += &format!("| {architecture} | {models} | {judge} | {gguf} |\n");
    }
    output::show(&format!("{text}\n{NOTES}\n"))
}
