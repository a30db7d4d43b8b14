//! Checkpoints whose matrices are coded: read as what the codes mean, in any window, with errors that name the file.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use epsmoe_base::{DType, Mix, env};
use epsmoe_model::{
    Activations, Checkpoint, Kept, ModelSpec, Part, Quantising, Tensor, WeightSource, Window, config,
};
use epsmoe_quant::{
    CodedTensor, QuantConfig, QuantError, Rows, StoredTensor, StoredTensors, StoredType, Target,
};
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Stored tensors by name.
#[derive(Clone, Default)]
struct Memory(BTreeMap<String, (StoredTensor, Vec<u8>)>);

impl StoredTensors for Memory {
    type Error = QuantError;

    fn find(&self, name: &str) -> Option<StoredTensor> {
        self.0.get(name).map(|(tensor, _)| tensor.clone())
    }

    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), QuantError> {
        into.copy_from_slice(&self.0[name].1[first as usize..][..into.len()]);
        Ok(())
    }
}

fn dtype(stored: StoredType) -> Dtype {
    match stored {
        StoredType::F32 => Dtype::F32,
        StoredType::BF16 => Dtype::BF16,
        StoredType::E4M3 => Dtype::F8_E4M3,
        StoredType::U8 => Dtype::U8,
        StoredType::I32 => Dtype::I32,
        StoredType::I64 => Dtype::I64,
        other => panic!("{other}"),
    }
}

fn write(folder: &Path, stored: &Memory, quantisation: &Value) {
    let views = stored.0.iter().map(|(name, (tensor, bytes))| {
        (name, TensorView::new(dtype(tensor.dtype), tensor.shape.clone(), bytes).unwrap())
    });
    fs::write(folder.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    let text = fs::read(fixture().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config["quantization_config"] = quantisation.clone();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
}

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral")
}

/// A fixture whose experts and attention are coded.
struct Quantised {
    folder: TempDir,
    stored: Memory,
    spec: ModelSpec,
}

fn quantised(target: Target) -> Quantised {
    let (spec, plain) = (config::read(&fixture()).unwrap(), Checkpoint::open(&fixture()).unwrap());
    let mut stored = Memory::default();
    for name in plain.names() {
        let found = plain.find(name).unwrap().unwrap();
        let elements: usize = found.shape.iter().product();
        let mut bytes = vec![0; found.dtype.bytes(elements)];
        plain.fill(name, 0, &mut bytes).unwrap();
        let coded = ["experts", "self_attn"].iter().any(|module| name.contains(module));
        if coded && found.shape[1] % 32 == 0 {
            let (pairs, _) = bytes.as_chunks();
            let weights: Vec<f32> = pairs.iter().map(|&pair| bf16::from_le_bytes(pair).to_f32()).collect();
            for part in target.encode(name, &weights, found.shape[1]).unwrap() {
                stored.0.insert(part.name, (part.tensor, part.bytes));
            }
        } else {
            let tensor = StoredTensor { dtype: found.dtype, shape: found.shape.to_vec() };
            stored.0.insert(name.to_owned(), (tensor, bytes));
        }
    }
    let folder = TempDir::new().unwrap();
    write(folder.path(), &stored, &target.config(&[]));
    Quantised { folder, stored, spec }
}

#[test]
fn parts_are_what_their_codes_mean() {
    let seed = env::test_seed();
    println!("EPSMOE_TEST_SEED={seed}");
    let mut mix = Mix::new(seed);
    for target in Target::ALL {
        let Quantised { folder, stored, spec } = quantised(target);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.check(&spec).unwrap(), None, "{target}: every tensor is used");
        let hints = QuantConfig::parse(&target.config(&[])).unwrap().hints;
        let mut coded_parts = 0;
        for part in spec.parts() {
            let located = spec.locate(part);
            let (source, kept) = checkpoint.kept(&located).unwrap().unwrap();
            let Kept::Coded(_) = kept else { continue };
            coded_parts += 1;
            let [n, k] = source.shape[..] else { panic!("{source:?}") };
            let find = |name: &str| stored.find(name);
            let coded = CodedTensor::detect(&source.name, &source.shape, &hints, find).unwrap().unwrap();
            let first = (mix.below(n), mix.below(k));
            let rows = first.0..first.0 + 1 + mix.below(n - first.0);
            let columns = first.1..first.1 + 1 + mix.below(k - first.1);
            let mut weights = vec![bf16::ZERO; rows.len() * columns.len()];
            coded.decode(&stored, Rows::range(rows.clone()), columns.clone(), &mut weights).unwrap();
            let window = Window { rows: Some(rows.clone()), columns: Some(columns.clone()) };
            let bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let expected = Tensor { dtype: DType::BF16, shape: vec![rows.len(), columns.len()], bytes };
            assert_eq!(checkpoint.read(&located, &window).unwrap(), expected, "{target} {part:?} {window:?}");
        }
        assert!(coded_parts > 20, "{target}: {coded_parts} coded parts");
    }
}

/// The message of a checkpoint that was changed, with DIR for its folder.
fn refused(target: Target, quantisation: Option<&Value>, change: impl FnOnce(&mut Memory)) -> String {
    let Quantised { folder, mut stored, spec } = quantised(target);
    change(&mut stored);
    write(folder.path(), &stored, quantisation.unwrap_or(&target.config(&[])));
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let read = |part: Part| checkpoint.read(&spec.locate(part), &Window::whole()).err();
    let error = checkpoint.check(&spec).err().or_else(|| spec.parts().find_map(read)).unwrap();
    error.to_string().replace(&folder.path().display().to_string(), "DIR")
}

const NAME: &str = "model.layers.0.self_attn.q_proj.weight";

#[test]
fn codes_that_do_not_fit_are_refused_with_the_name_of_the_file() {
    let scale = format!("{NAME}_scale_inv");
    let message = refused(Target::Fp8PerBlock, None, |stored| drop(stored.0.remove(&scale)));
    assert_eq!(
        message,
        format!(
            "DIR/model.safetensors: tensor `{NAME}`: it is F8_E4M3, but there is no `{scale}` beside it; the file is \
             damaged or incomplete: fetch it again"
        )
    );
    let message = refused(Target::Fp8PerBlock, None, |stored| stored.0.get_mut(&scale).unwrap().1.fill(0xff));
    assert!(
        message.starts_with(&format!("DIR/model.safetensors: tensor `{NAME}`: row 0, column 0 is NaN")),
        "{message}"
    );
    let message = refused(Target::Fp8PerBlock, None, |stored| stored.0.get_mut(&scale).unwrap().1.fill(0));
    assert!(message.contains("the scale at row 0, column 0 is zero where weights are not"), "{message}");
    let shape = NAME.replace("weight", "weight_shape");
    let message = refused(Target::Int4, None, |stored| stored.0.get_mut(&shape).unwrap().1[8] ^= 2);
    assert!(message.contains(&format!("tensor `{NAME}`: `{shape}` says that it is [")), "{message}");
}

/// A method that is not read matters only where tensors are coded.
#[test]
fn methods_that_are_not_read_are_refused_where_tensors_are_coded() {
    let method = serde_json::json!({"quant_method": "bitsandbytes"});
    let message = refused(Target::Int4, Some(&method), |_| ());
    assert!(
        message.starts_with("DIR/config.json: `quantization_config`: its `quant_method` is bitsandbytes"),
        "{message}"
    );
    let folder = TempDir::new().unwrap();
    let plain = Checkpoint::open(&fixture()).unwrap();
    let mut stored = Memory::default();
    for name in plain.names() {
        let found = plain.find(name).unwrap().unwrap();
        let mut bytes = vec![0; found.dtype.bytes(found.shape.iter().product())];
        plain.fill(name, 0, &mut bytes).unwrap();
        let tensor = StoredTensor { dtype: found.dtype, shape: found.shape.to_vec() };
        stored.0.insert(name.to_owned(), (tensor, bytes));
    }
    write(folder.path(), &stored, &method);
    let spec = config::read(folder.path()).unwrap();
    assert_eq!(Checkpoint::open(folder.path()).unwrap().check(&spec).unwrap(), None);
}

#[test]
fn makers_say_whether_activations_are_quantised_too() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures");
    let open = |name| Checkpoint::open(&fixtures.join(name)).unwrap();
    for (name, dynamic) in
        [("deepseek_v3_fp8", true), ("mixtral_int4", false), ("qwen3_moe_mxfp4", false), ("mixtral", false)]
    {
        let said = open(name).activations().unwrap();
        assert_eq!(matches!(said, Activations::Dynamic { .. }), dynamic, "{name}: {said:?}");
    }
    // Quantised on the way is what it would be had it been quantised before.
    for target in Target::ALL {
        let said = Quantising::new(Box::new(open("mixtral")), target).activations().unwrap();
        let dynamic = target.config(&[])["activation_scheme"] == "dynamic";
        assert_eq!(matches!(said, Activations::Dynamic { .. }), dynamic, "{target}");
    }
}
