//! The functions of NCCL that this room needs, from whichever version is installed.

use super::NcclError;
use crate::DeviceError;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null;
use std::sync::OnceLock;

/// The names it goes by; a package for programs to run with has only the first.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// A communicator, as the library sees it.
pub(super) type Comm = *mut c_void;

/// What ranks must know to find each other; one of them makes it and tells the others.
pub const UNIQUE_ID_BYTES: usize = 128;

/// The same, as the library passes it.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct UniqueId(pub(super) [u8; UNIQUE_ID_BYTES]);

/// How a communicator is to be, in the layout of version 2.18, which later ones read too.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    /// Calls do not block; everything else is as the library would have it.
    pub(super) fn non_blocking() -> Self {
        /// Marks a config as one, and a number as not set.
        const MAGIC: c_uint = 0xcafe_beef;
        const UNDEFINED: c_int = c_int::MIN;
        Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: 2_18_00,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: null(),
            split_share: UNDEFINED,
        }
    }
}

/// The type of what is sent: bytes.
pub(super) const BYTES: c_int = 1;

/// What a function answers.
pub(super) type Code = c_int;
pub(super) const SUCCESS: Code = 0;
pub(super) const IN_PROGRESS: Code = 7;

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($argument:ty),*) -> $answer:ty;)*) => {
        /// The library.
        pub(super) struct Nccl {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $answer,)*
            _library: Library,
        }

        impl Nccl {
            fn of(library: Library) -> Result<Self, libloading::Error> {
                Ok(Nccl {
                    // SAFETY: the types are those of the library's header, unchanged since version 2.18. The functions are
                    // called only while the library is loaded, which it is until the process ends.
                    $($field: *unsafe { library.get($symbol) }?,)*
                    _library: library,
                })
            }
        }
    };
}

functions! {
    get_version = b"ncclGetVersion": fn(*mut c_int) -> Code;
    get_unique_id = b"ncclGetUniqueId": fn(*mut UniqueId) -> Code;
    init_rank = b"ncclCommInitRankConfig": fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> Code;
    split = b"ncclCommSplit": fn(Comm, c_int, c_int, *mut Comm, *mut Config) -> Code;
    finalize = b"ncclCommFinalize": fn(Comm) -> Code;
    destroy = b"ncclCommDestroy": fn(Comm) -> Code;
    abort = b"ncclCommAbort": fn(Comm) -> Code;
    async_error = b"ncclCommGetAsyncError": fn(Comm, *mut Code) -> Code;
    group_start = b"ncclGroupStart": fn() -> Code;
    group_end = b"ncclGroupEnd": fn() -> Code;
    send = b"ncclSend": fn(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> Code;
    receive = b"ncclRecv": fn(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> Code;
    error_string = b"ncclGetErrorString": fn(Code) -> *const c_char;
    last_error = b"ncclGetLastError": fn(Comm) -> *const c_char;
}

impl Nccl {
    /// The library, loaded once.
    pub(super) fn loaded() -> Result<&'static Nccl, DeviceError> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        let loaded = LOADED.get_or_init(|| {
            // SAFETY: what a library does when it is loaded is its own; NCCL's does nothing but set itself up.
            let opened = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok());
            let library = opened.ok_or(
                "the library NCCL was not found: install it (package libnccl2, or nvidia-nccl-cu13 from PyPI) and put its \
                 folder on LD_LIBRARY_PATH",
            )?;
            Nccl::of(library).map_err(|error| format!("this NCCL is older than 2.18: {error}"))
        });
        loaded.as_ref().map_err(|problem| DeviceError::Unsupported(problem.clone()))
    }

    /// `Ok` if a function answered success, or that it goes on meanwhile.
    pub(super) fn check(&self, call: &'static str, code: Code, comm: Comm) -> Result<(), NcclError> {
        if matches!(code, SUCCESS | IN_PROGRESS) {
            return Ok(());
        }
        let text = |text: *const c_char| match text.is_null() {
            // SAFETY: the library gave a string that ends in zero and that nothing overwrites before the next call.
            false => unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned(),
            true => String::new(),
        };
        // SAFETY: the communicator is alive or null, which means the process.
        let (reason, more) = unsafe { (text((self.error_string)(code)), text((self.last_error)(comm))) };
        let reason = if more.is_empty() { reason } else { format!("{reason} ({more})") };
        Err(NcclError::Failed { call, reason })
    }
}
