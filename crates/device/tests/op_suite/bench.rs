//! A processor to try operations on: numbers go in, an operation runs, numbers come out.

use epsmoe_base::float8::{E4M3, to_e4m3};
use epsmoe_base::{DType, Deadline, Fault, Lane, Layer, Mix, Place};
use epsmoe_device::op::{Attention, Embed, HostToDevice, KvWrite, Op, Sight};
use epsmoe_device::{Backend, Buffer, DeviceError, TensorBytes, Weight, WeightShape};
use half::{bf16, f16};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::time::Duration;

/// Rows of numbers on the host, each exactly a number of the format that it was made for.
#[derive(Clone, Debug)]
pub(crate) struct Sheet {
    pub(crate) rows: usize,
    pub(crate) width: usize,
    pub(crate) values: Vec<f32>,
}

impl Sheet {
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..][..self.width]
    }

    pub(crate) fn take(&self, rows: std::ops::Range<usize>) -> Sheet {
        let values = self.values[rows.start * self.width..rows.end * self.width].to_vec();
        Sheet { rows: rows.len(), width: self.width, values }
    }

    /// `Σ a[i] · b[i]`.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    }

    fn bytes(&self, dtype: DType) -> Vec<u8> {
        let values = self.values.iter().copied();
        match dtype {
            DType::F32 => values.flat_map(f32::to_le_bytes).collect(),
            DType::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
            DType::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            DType::U32 | DType::E4M3 => panic!("no tensors of a model"),
        }
    }
}

/// A view somewhere inside a larger allocation. What lies around it is poison, and must stay so.
pub(crate) struct Placed {
    pub(crate) view: Buffer,
    whole: Buffer,
}

/// One processor; see the module.
pub(crate) struct Bench<B: Backend> {
    pub(crate) device: B,
    pub(crate) dtype: DType,
    pub(crate) seed: u64,
    mix: RefCell<Mix>,
    names: Cell<u64>,
    seen: RefCell<BTreeSet<usize>>,
}

/// Number of operations there are.
const OPERATIONS: usize = 33;

/// Each operation's own number.
fn number(op: &Op) -> usize {
    match op {
        Op::HostToDevice(_) => 0,
        Op::Embed(_) => 1,
        Op::Norm(_) => 2,
        Op::Gemm(_) => 3,
        Op::RopeTable(_) => 4,
        Op::Rotate(_) => 5,
        Op::KvWrite(_) => 6,
        Op::Attention(_) => 7,
        Op::Route(_) => 8,
        Op::Gather(_) => 9,
        Op::Reduce(_) => 10,
        Op::Add(_) => 11,
        Op::Copy(_) => 12,
        Op::Clamp(_) => 13,
        Op::GateRows(_) => 14,
        Op::SortBySlot(_) => 15,
        Op::ExpertGemm(_) => 16,
        Op::ArgMax(_) => 17,
        Op::AssignSlots(_) => 18,
        Op::CountSlots(_) => 19,
        Op::SendOrder(_) => 20,
        Op::ReceiveOrder(_) => 21,
        Op::GatherFp8(_) => 22,
        Op::Scale(_) => 23,
        Op::Activate(_) => 24,
        Op::AddSlotBias(_) => 25,
        Op::ShortConv(_) => 26,
        Op::Recurrence(_) => 27,
        Op::Gate(_) => 28,
        Op::SoftCap(_) => 29,
        Op::AddNorm(_) => 30,
        Op::NormRotate(_) => 31,
        Op::ScaleTerms(_) => 32,
        Op::SpreadSlots(_) => 33,
    }
}

impl<B: Backend> Bench<B> {
    /// `device` was made for `dtype` and `seed`; its fresh memory is poison.
    pub(crate) fn new(device: B, seed: u64) -> Self {
        Bench {
            dtype: device.dtype(),
            device,
            seed,
            mix: RefCell::new(Mix::new(seed)),
            names: Cell::new(0),
            seen: RefCell::default(),
        }
    }

    pub(crate) fn below(&self, bound: usize) -> usize {
        self.mix.borrow_mut().below(bound)
    }

    /// Random numbers of the bench's format, in `-size..size`.
    pub(crate) fn random(&self, rows: usize, width: usize, size: f32) -> Sheet {
        self.random_of(self.dtype, rows, width, size)
    }

    pub(crate) fn random_of(&self, dtype: DType, rows: usize, width: usize, size: f32) -> Sheet {
        let mut mix = self.mix.borrow_mut();
        let round = |value: f32| if dtype == DType::BF16 { bf16::from_f32(value).to_f32() } else { value };
        let values = (0..rows * width).map(|_| round(size * mix.signed())).collect();
        Sheet { rows, width, values }
    }

    /// Numbers in `-2..2` that every format has exactly.
    pub(crate) fn coarse(&self, rows: usize, width: usize) -> Sheet {
        let values = (0..rows * width).map(|_| self.below(256) as f32 / 64.0 - 2.0).collect();
        Sheet { rows, width, values }
    }

    /// `0..count` in random order.
    pub(crate) fn shuffled(&self, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        (1..count).for_each(|last| order.swap(last, self.below(last + 1)));
        order
    }

    /// Room for `[rows, width]` somewhere inside a poisoned allocation. In half of them rows start on a multiple of
    /// eight elements, as they do in a model, which opens faster ways to some processors.
    pub(crate) fn room(&self, dtype: DType, rows: usize, width: usize) -> Placed {
        match self.below(2) {
            0 => self.room_on(1, dtype, rows, width),
            _ => self.room_on(8, dtype, rows, width),
        }
    }

    /// Room whose rows begin at a multiple of `unit` elements.
    pub(crate) fn room_on(&self, unit: usize, dtype: DType, rows: usize, width: usize) -> Placed {
        let (above, left, right) = (self.below(3), unit * self.below(3), unit * self.below(3));
        let (height, stride) = (above + rows + self.below(3), (left + width).next_multiple_of(unit) + right);
        let whole = self.device.allocate("room", dtype, height, stride).expect("memory");
        let view = whole.rows(above..above + rows).and_then(|rows| rows.columns(left..left + width));
        Placed { view: view.expect("a view inside"), whole }
    }

    /// The numbers of `sheet`, in the bench's format.
    pub(crate) fn put(&self, sheet: &Sheet) -> Placed {
        self.put_as(self.dtype, sheet)
    }

    pub(crate) fn put_as(&self, dtype: DType, sheet: &Sheet) -> Placed {
        let placed = self.room(dtype, sheet.rows, sheet.width);
        self.fill(&placed.view, sheet);
        placed
    }

    /// The numbers of `sheet` in rows that begin at a multiple of `unit` elements.
    pub(crate) fn put_on(&self, unit: usize, sheet: &Sheet) -> Placed {
        let placed = self.room_on(unit, self.dtype, sheet.rows, sheet.width);
        self.fill(&placed.view, sheet);
        placed
    }

    /// The numbers of `sheet` over `scale` as codes, and the numbers of these; rows of NaN stay poison. Rows begin at a multiple of
    /// `unit` elements.
    pub(crate) fn put_codes(&self, unit: usize, sheet: &Sheet, scale: f32) -> (Placed, Sheet) {
        let placed = self.room_on(unit, DType::E4M3, sheet.rows, sheet.width);
        let stored: Vec<u32> = (0..sheet.rows as u32)
            .filter(|&row| !sheet.row(row as usize).iter().any(|x| x.is_nan()))
            .collect();
        let values = stored.iter().flat_map(|&row| sheet.row(row as usize)).copied().collect();
        let x = self.put(&Sheet { rows: stored.len(), width: sheet.width, values }).view;
        let (slots, cache) = (self.put_words(&stored, 1).view, placed.view.clone());
        self.run("filling", KvWrite::of(x, slots, cache, scale));
        let number = |value: &f32| E4M3[usize::from(to_e4m3(value / scale))];
        (placed, Sheet { values: sheet.values.iter().map(number).collect(), ..sheet.clone() })
    }

    /// The numbers of `sheet` into a buffer at hand.
    pub(crate) fn fill(&self, out: &Buffer, sheet: &Sheet) {
        let (rows, width) = (sheet.rows, sheet.width);
        let table = self.load(WeightShape::Table { rows, width }, out.dtype, &[sheet]);
        let ids = self.put_words(&(0..rows as u32).collect::<Vec<_>>(), 1).view;
        self.run("filling", Embed { ids, table, out: out.clone() });
    }

    /// Indices, in rows of `width`.
    pub(crate) fn put_words(&self, words: &[u32], width: usize) -> Placed {
        let placed = self.room(DType::U32, words.len() / width, width);
        self.run("filling", HostToDevice { words: words.into(), out: placed.view.clone() });
        placed
    }

    /// A weight from tensors stored as `stored`.
    pub(crate) fn load(&self, shape: WeightShape, stored: DType, sheets: &[&Sheet]) -> Weight {
        self.names.set(self.names.get() + 1);
        let bytes: Vec<Vec<u8>> = sheets.iter().map(|sheet| sheet.bytes(stored)).collect();
        let tensors: Vec<_> = bytes.iter().map(|bytes| TensorBytes { dtype: stored, bytes }).collect();
        self.device.load(&format!("weight {}", self.names.get()), shape, &tensors).expect("a weight")
    }

    pub(crate) fn matrix(&self, sheet: &Sheet) -> Weight {
        self.load(WeightShape::Matrix { n: sheet.rows, k: sheet.width }, self.dtype, &[sheet])
    }

    pub(crate) fn gate_up(&self, gate: &Sheet, up: &Sheet) -> Weight {
        self.load(WeightShape::GateUp { inner: gate.rows, k: gate.width }, self.dtype, &[gate, up])
    }

    /// A vector, stored in float32: what is used element by element is never rounded to the model's format.
    pub(crate) fn vector(&self, sheet: &Sheet) -> Weight {
        self.load(WeightShape::Vector { n: sheet.width }, DType::F32, &[sheet])
    }

    /// Runs one operation to its end; a fault or a refusal is the test's failure.
    pub(crate) fn run(&self, what: &str, op: impl Into<Op>) {
        let seed = self.seed;
        let op = op.into();
        self.seen.borrow_mut().insert(number(&op));
        self.try_run(op)
            .unwrap_or_else(|refusal| panic!("{what}, seed {seed}: {refusal}"))
            .unwrap_or_else(|fault| panic!("{what}, seed {seed}: {fault}"));
    }

    /// Runs one operation: refused at the door, faulted on its lane, or done.
    pub(crate) fn try_run(&self, op: Op) -> Result<Result<(), Fault>, DeviceError> {
        // The host waits for each operation, so either lane is in order. Attention belongs to the lane that computes.
        let lane = match op {
            Op::Attention(_) => Lane::Compute,
            _ => Lane::ALL[self.below(Lane::ALL.len())],
        };
        self.device.enqueue(lane, Place::layer(Layer(7)), op)?;
        Ok(self.device.wait(&self.device.record(lane), Deadline::after(Duration::from_secs(60))))
    }

    /// The numbers in a view, once nothing around it was touched.
    pub(crate) fn get(&self, what: &str, placed: &Placed) -> Vec<f32> {
        let all = self.device.read_f32(&placed.whole).expect("ordered by the host");
        inside(placed, &all, f32::is_nan).unwrap_or_else(|at| panic!("{what}, seed {}: {at}", self.seed))
    }

    pub(crate) fn get_words(&self, what: &str, placed: &Placed) -> Vec<u32> {
        let all = self.device.read_u32(&placed.whole).expect("ordered by the host");
        inside(placed, &all, |word| word == u32::MAX)
            .unwrap_or_else(|at| panic!("{what}, seed {}: {at}", self.seed))
    }

    /// Whether a view holds what it should, within the tolerance of its format.
    pub(crate) fn check(&self, what: &str, placed: &Placed, want: &[f64]) {
        let got = self.get(what, placed);
        let want: Vec<f32> = want.iter().map(|&want| want as f32).collect();
        if let Some((at, got, want)) = placed.view.dtype.tolerance().first_violation(&got, &want) {
            let (row, column) = (at / placed.view.width, at % placed.view.width);
            panic!(
                "{what}, {}, seed {}: row {row}, column {column} is {got}, not {want}",
                self.dtype, self.seed
            );
        }
    }

    /// Whether a view holds exactly that.
    pub(crate) fn check_exactly(&self, what: &str, placed: &Placed, want: &[f32]) {
        assert_eq!(self.get(what, placed), want, "{what}, {}, seed {}", self.dtype, self.seed);
    }

    /// Whether every operation there is has run on this bench.
    pub(crate) fn check_complete(&self) {
        let missing: Vec<usize> = (0..OPERATIONS).filter(|op| !self.seen.borrow().contains(op)).collect();
        assert!(missing.is_empty(), "operations {missing:?} were never run");
    }
}

/// The elements inside a view of `whole`, or where something outside it is no longer poison.
fn inside<T: Copy>(placed: &Placed, whole: &[T], poison: impl Fn(T) -> bool) -> Result<Vec<T>, String> {
    let Placed { view, whole: Buffer { width: stride, .. } } = placed;
    let mut values = Vec::new();
    for (at, &value) in whole.iter().enumerate() {
        let in_row = (view.offset % stride..view.offset % stride + view.width).contains(&(at % stride));
        let first = view.offset / stride;
        if in_row && (first..first + view.rows).contains(&(at / stride)) {
            values.push(value);
        } else if !poison(value) {
            return Err(format!("element {at}, outside of {view:?}, was written"));
        }
    }
    Ok(values)
}

/// Sequences in a paged cache: which cached positions exist, and which of them are new tokens.
pub(crate) struct Sequences {
    /// Positions of each sequence that were cached before, and new tokens after them.
    pub(crate) lengths: Vec<(usize, usize)>,
    pub(crate) block_size: usize,
    /// Cache blocks of each sequence, all different, in random order.
    pub(crate) blocks: Vec<Vec<u32>>,
    pub(crate) slots: usize,
}

impl Sequences {
    pub(crate) fn new<B: Backend>(bench: &Bench<B>, lengths: &[(usize, usize)], block_size: usize) -> Self {
        let needed = |&(cached, new): &(usize, usize)| (cached + new).div_ceil(block_size);
        let count: usize = lengths.iter().map(needed).sum::<usize>() + 2;
        let mut free = bench.shuffled(count).into_iter();
        let blocks = lengths.iter().map(|length| free.by_ref().take(needed(length)).collect()).collect();
        Sequences { lengths: lengths.to_vec(), block_size, blocks, slots: count * block_size }
    }

    /// Sequence and position of every new token.
    pub(crate) fn tokens(&self) -> Vec<(usize, usize)> {
        let new = |(sequence, &(cached, new)): (usize, &(usize, usize))| {
            (cached..cached + new).map(move |position| (sequence, position)).collect::<Vec<_>>()
        };
        self.lengths.iter().enumerate().flat_map(new).collect()
    }

    pub(crate) fn slot(&self, sequence: usize, position: usize) -> usize {
        self.blocks[sequence][position / self.block_size] as usize * self.block_size
            + position % self.block_size
    }

    /// A cache whose used slots hold random numbers, and all others NaN.
    pub(crate) fn cache<B: Backend>(&self, bench: &Bench<B>, width: usize) -> Sheet {
        let mut cache = Sheet { rows: self.slots, width, values: vec![f32::NAN; self.slots * width] };
        for (sequence, &(cached, new)) in self.lengths.iter().enumerate() {
            for position in 0..cached + new {
                let slot = self.slot(sequence, position);
                let row = bench.random(1, width, 1.0).values;
                cache.values[slot * width..][..width].copy_from_slice(&row);
            }
        }
        cache
    }

    /// The operation over these sequences; the tokens of `which` only, a part of each sequence.
    pub(crate) fn attention<B: Backend>(
        &self,
        bench: &Bench<B>,
        heads: &Heads,
        parts: &CacheParts,
    ) -> Attention {
        let tokens = self.tokens();
        let mut starts = vec![0];
        self.lengths.iter().for_each(|&(_, new)| starts.push(starts[starts.len() - 1] + new as u32));
        let positions: Vec<u32> = tokens.iter().map(|&(_, position)| position as u32).collect();
        let widest = self.blocks.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let mut blocks = Vec::new();
        for row in &self.blocks {
            // Entries past a sequence's blocks name nothing.
            blocks.extend(row.iter().copied().chain(std::iter::repeat(u32::MAX)).take(widest));
        }
        Attention {
            q: parts.q.clone(),
            keys: parts.keys.clone(),
            values: parts.values.clone(),
            sequence_starts: bench.put_words(&starts, 1).view,
            positions: bench.put_words(&positions, 1).view,
            blocks: bench.put_words(&blocks, widest).view,
            block_size: self.block_size,
            longest: widest * self.block_size,
            heads: heads.heads,
            kv_heads: heads.kv_heads,
            scale: heads.scale() * parts.scales.0,
            value_scale: parts.scales.1,
            sight: heads.sight,
            sinks: heads.sinks.then(|| {
                let values = (0..heads.heads).map(Heads::sink).collect();
                bench.vector(&Sheet { rows: 1, width: heads.heads, values })
            }),
            out: parts.out.clone(),
        }
    }
}

/// Where an attention's numbers lie.
pub(crate) struct CacheParts {
    pub(crate) q: Buffer,
    pub(crate) keys: Buffer,
    pub(crate) values: Buffer,
    /// Factors of keys and of values.
    pub(crate) scales: (f32, f32),
    pub(crate) out: Buffer,
}

/// The shape of an attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) key_width: usize,
    pub(crate) value_width: usize,
    /// Values are the leading columns of the keys.
    pub(crate) latent: bool,
    pub(crate) sight: Sight,
    pub(crate) sinks: bool,
}

impl Heads {
    /// The score of a head that belongs to no key, some among those of keys, some above or below them all.
    pub(crate) fn sink(head: usize) -> f32 {
        [0.5, 9.0, -2.0, -30.0, 2.0][head % 5]
    }

    pub(crate) fn scale(&self) -> f32 {
        2.0 / (self.key_width as f32).sqrt()
    }
}
