//! The operations of a processor: plain descriptions, one struct each, with the equation, the shapes and the
//! memory it touches. A backend only interprets them.

mod activate;
mod assignments;
mod attention;
mod gemm;
mod norm;
mod recurrent;
mod rope;
mod route;
mod rows;

pub use activate::{Activate, Activation, AddSlotBias, SlotBias, Swish};
pub use assignments::{
    AssignSlots, CountSlots, NONE, ReceiveOrder, SendOrder, Slotless, SortBySlot, SpreadSlots, Travelled,
};
pub use attention::{Attention, KvRows, KvWrite, Sight};
pub use gemm::{Epilogue, ExpertGemm, Gemm, GemmPart};
pub(crate) use norm::not_finite;
pub use norm::{AddNorm, Norm, NormKind, NormRotate, Origin, TurnedNorm};
pub use recurrent::{Carried, Gate, Gating, Recurrence, Rule, ShortConv};
pub use rope::{Growth, RopeStyle, RopeTable, Rotate};
pub use route::{ArgMax, GroupLimit, GroupScore, Route, Score, TopKRouter};
pub use rows::{
    Add, Clamp, Copy, Embed, Fp8, GateRows, Gather, GatherFp8, HostToDevice, Reduce, Scale, ScaleTerms,
    SoftCap,
};

use crate::{AllocationId, Buffer, DeviceError, Weight, WeightSlot};
use epsmoe_base::{DType, Phase};
use std::ops::Range;

macro_rules! ops {
    ($($op:ident => $name:literal, $phase:ident;)*) => {
        /// Any operation.
        #[derive(Clone, Debug)]
        pub enum Op {
            $(#[doc = concat!("See [`", stringify!($op), "`](struct@", stringify!($op), ").")] $op($op),)*
        }

        impl Op {
            /// The operation's name in messages and timelines.
            pub fn name(&self) -> &'static str {
                match self { $(Op::$op(_) => $name,)* }
            }

            /// What the operation is for, where its place does not say.
            pub fn phase(&self) -> Phase {
                match self { $(Op::$op(_) => Phase::$phase,)* }
            }

            /// Checks the shapes once, at the door; kernels trust them after.
            pub fn check(&self) -> Result<(), DeviceError> {
                match self { $(Op::$op(op) => op.check(),)* }
            }

            /// The memory the operation reads and writes.
            pub fn accesses(&self) -> Accesses {
                match self { $(Op::$op(op) => op.accesses(),)* }
            }
        }

        $(impl From<$op> for Op {
            fn from(op: $op) -> Op {
                Op::$op(op)
            }
        })*
    };
}

ops! {
    HostToDevice => "host_to_device", Input;
    Embed => "embed", Embed;
    Norm => "norm", Norm;
    AddNorm => "add_norm", Norm;
    NormRotate => "norm_rotate", Norm;
    Gemm => "gemm", Projection;
    ExpertGemm => "gemm", GateUp;
    RopeTable => "rope_table", Rope;
    Rotate => "rotate", Rope;
    KvWrite => "kv_write", KvWrite;
    Attention => "attention", Attention;
    Route => "route", Route;
    ArgMax => "argmax", Sample;
    AssignSlots => "assign_slots", Maps;
    CountSlots => "count_slots", Count;
    SendOrder => "send_order", Pack;
    SpreadSlots => "spread_slots", Pack;
    ReceiveOrder => "receive_order", Maps;
    SortBySlot => "sort_by_slot", Maps;
    Gather => "gather", Other;
    GatherFp8 => "gather", Other;
    Reduce => "reduce", Other;
    Add => "add", Residual;
    Copy => "copy", Other;
    Clamp => "clamp", Projection;
    GateRows => "gate_rows", SharedGate;
    Scale => "scale", Residual;
    ScaleTerms => "scale_terms", Expand;
    SoftCap => "soft_cap", LmHead;
    Activate => "activate", GateUp;
    AddSlotBias => "add_slot_bias", Down;
    ShortConv => "short_conv", Attention;
    Recurrence => "recurrence", Attention;
    Gate => "gate", Attention;
}

impl Op {
    /// Who is to be named for numbers that the operation finds in its input, if not the operation.
    pub(crate) fn origin(&self) -> Option<Origin> {
        match self {
            Op::Norm(op) => op.origin,
            Op::AddNorm(op) => op.norm.origin,
            _ => None,
        }
    }
}

/// One piece of memory an operation touches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The allocation.
    pub allocation: AllocationId,
    /// Its name, for messages.
    pub name: &'static str,
    /// From the first to one past the last byte touched.
    pub bytes: Range<usize>,
    /// Whether it is written.
    pub write: bool,
}

/// Everything an operation touches: what it declares is what the hazard check orders.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    memory: Vec<Access>,
    slots_read: Vec<WeightSlot>,
    slots_written: Vec<WeightSlot>,
}

impl Accesses {
    /// Nothing yet.
    pub fn new() -> Self {
        Accesses::default()
    }

    /// Also reads `buffer`.
    pub fn read(self, buffer: &Buffer) -> Self {
        self.add(buffer, false)
    }

    /// Also writes `buffer`.
    pub fn write(self, buffer: &Buffer) -> Self {
        self.add(buffer, true)
    }

    /// Also reads the slots of `weights`.
    pub fn read_weights<'a>(mut self, weights: impl IntoIterator<Item = &'a Weight>) -> Self {
        self.slots_read.extend(weights.into_iter().map(|weight| weight.slot));
        self
    }

    /// Also writes the slot that `weight` is held in.
    pub fn write_weight(mut self, weight: &Weight) -> Self {
        self.slots_written.push(weight.slot);
        self
    }

    /// What is touched of buffers, nothing of it empty.
    pub fn iter(&self) -> impl Iterator<Item = &Access> {
        self.memory.iter()
    }

    /// The slots of weights that are read.
    pub fn slots_read(&self) -> &[WeightSlot] {
        &self.slots_read
    }

    /// Those that are written.
    pub fn slots_written(&self) -> &[WeightSlot] {
        &self.slots_written
    }

    /// Also touches what `other` does; of each allocation, all from the first byte to the last.
    pub(crate) fn join(&mut self, other: &Accesses) {
        for access in &other.memory {
            let same =
                |have: &&mut Access| (have.allocation, have.write) == (access.allocation, access.write);
            match self.memory.iter_mut().find(same) {
                Some(have) => {
                    have.bytes =
                        have.bytes.start.min(access.bytes.start)..have.bytes.end.max(access.bytes.end);
                }
                None => self.memory.push(access.clone()),
            }
        }
        self.slots_read.extend(&other.slots_read);
        self.slots_written.extend(&other.slots_written);
    }

    fn add(mut self, buffer: &Buffer, write: bool) -> Self {
        let bytes = buffer.byte_range();
        if bytes.is_empty() {
            return self;
        }
        // Neighbouring views of one allocation (the columns of heads, the rows of experts) become one access.
        if let Some(last) = self.memory.last_mut()
            && last.allocation == buffer.allocation
            && last.write == write
            && bytes.start <= last.bytes.end
            && last.bytes.start <= bytes.end
        {
            last.bytes = last.bytes.start.min(bytes.start)..last.bytes.end.max(bytes.end);
            return self;
        }
        self.memory.push(Access { allocation: buffer.allocation, name: buffer.name, bytes, write });
        self
    }
}

fn same_rows(op: &str, buffers: &[&Buffer]) -> Result<(), DeviceError> {
    match buffers.iter().find(|buffer| buffer.rows != buffers[0].rows) {
        Some(other) => Err(DeviceError::Shape(format!(
            "{op}: {:?} and {other:?} must have equally many rows",
            buffers[0]
        ))),
        None => Ok(()),
    }
}

/// What [`expect`] does, but the buffer may be in float32 too.
fn expect_wide(op: &str, what: &str, buffer: &Buffer, dtype: DType, width: usize) -> Result<(), DeviceError> {
    expect(op, what, buffer, if buffer.dtype == DType::F32 { DType::F32 } else { dtype }, width)
}

fn expect(op: &str, what: &str, buffer: &Buffer, dtype: DType, width: usize) -> Result<(), DeviceError> {
    if buffer.dtype == dtype && buffer.width == width {
        return Ok(());
    }
    Err(DeviceError::Shape(format!("{op}: {what} is {buffer:?}, but must be {dtype} of width {width}")))
}
