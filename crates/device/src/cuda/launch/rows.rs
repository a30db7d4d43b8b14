//! Operations that go row by row and element by element.

use super::{Launch, Refusal, Rows, is_empty};
use crate::cuda::report::Report;
use crate::op::{Add, ArgMax, Clamp, Copy, Embed, GateRows, Gather, KvWrite};
use epsmoe_base::DType;

/// The twin of `Args` in the sources of kernels that follow indices: three views and where to complain.
#[repr(C)]
#[derive(Clone, Copy)]
struct IndexedArgs {
    views: [Rows; 3],
    report: Report,
}

/// The twin of `Args` in `argmax.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ArgMaxArgs {
    logits: Rows,
    tokens: Rows,
    report: Report,
}

/// The twin of `Args` in `clamp.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ClampArgs {
    x: Rows,
    limit: f32,
    padding: u32,
}

impl Launch<'_> {
    pub(super) fn arg_max(&mut self, op: &ArgMax) -> Result<(), Refusal> {
        if is_empty(&op.logits) {
            return Ok(());
        }
        let arguments = ArgMaxArgs {
            logits: self.rows(&op.logits)?,
            tokens: self.rows(&op.tokens)?,
            report: self.report,
        };
        let kernel = self.kernels.get("argmax", DType::F32, DType::F32)?;
        self.start(&kernel.function, (op.logits.rows as u32, 1), 0, arguments)
    }

    pub(super) fn embed(&mut self, op: &Embed) -> Result<(), Refusal> {
        let table = self.weights.get(&op.table)?;
        let rows = Rows {
            start: table.start,
            stride: table.stride as u64,
            rows: table.rows as u32,
            width: table.width as u32,
        };
        let views = [self.rows(&op.ids)?, rows, self.rows(&op.out)?];
        let arguments = IndexedArgs { views, report: self.report };
        self.runs("embed", table.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn kv_write(&mut self, op: &KvWrite) -> Result<(), Refusal> {
        let views = [self.rows(&op.x)?, self.rows(&op.slots)?, self.rows(&op.cache)?];
        let arguments = IndexedArgs { views, report: self.report };
        self.runs("kv_write", op.x.dtype, op.cache.dtype, &op.x, arguments)
    }

    pub(super) fn gather(&mut self, op: &Gather) -> Result<(), Refusal> {
        let views = [self.rows(&op.x)?, self.rows(&op.index)?, self.rows(&op.out)?];
        let arguments = IndexedArgs { views, report: self.report };
        self.stretches("gather", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn add(&mut self, op: &Add) -> Result<(), Refusal> {
        let arguments = [self.rows(&op.x)?, self.rows(&op.out)?];
        self.runs("add", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn copy(&mut self, op: &Copy) -> Result<(), Refusal> {
        let arguments = [self.rows(&op.x)?, self.rows(&op.out)?];
        self.runs("copy", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    pub(super) fn clamp(&mut self, op: &Clamp) -> Result<(), Refusal> {
        let arguments = ClampArgs { x: self.rows(&op.x)?, limit: op.limit, padding: 0 };
        self.runs("clamp", op.x.dtype, op.x.dtype, &op.x, arguments)
    }

    pub(super) fn gate_rows(&mut self, op: &GateRows) -> Result<(), Refusal> {
        let arguments = [self.rows(&op.gate)?, self.rows(&op.x)?];
        self.runs("gate_rows", op.x.dtype, op.x.dtype, &op.x, arguments)
    }
}
