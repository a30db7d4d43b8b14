//! CUDA C++ to machine code, by NVRTC. Needs the library, but no GPU.

use crate::DeviceError;
use cudarc::nvrtc::sys;
use std::ffi::{CStr, CString, c_char};
use std::ptr::null_mut;

/// A translation unit and the headers it may include.
pub(super) struct Unit<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
    /// Name and text.
    pub(super) headers: &'a [(&'a str, &'a str)],
}

/// What came of it.
pub(super) struct Compiled {
    pub(super) cubin: Vec<u8>,
    /// What the compiler said; with `--ptxas-options=-v`, what each kernel uses.
    pub(super) log: String,
}

/// Major and minor version of the library.
pub(super) fn version() -> Result<(i32, i32), DeviceError> {
    // SAFETY: only tries to load the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::Unsupported(
            "the CUDA compiler library NVRTC was not found; install CUDA 13.0 (package cuda-nvrtc-13-0, or \
             nvidia-cuda-nvrtc from PyPI) and put its lib folder on LD_LIBRARY_PATH"
                .into(),
        ));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is present; both results outlive the call.
    check("version", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    Ok((major, minor))
}

/// Compiles for one architecture. Only once [`version`] has found the library.
pub(super) fn compile(unit: &Unit<'_>, options: &[String]) -> Result<Compiled, DeviceError> {
    let terminated = |text: &str| {
        CString::new(text).map_err(|_| DeviceError::Unsupported(format!("{} holds a zero byte", unit.name)))
    };
    let (name, text) = (terminated(unit.name)?, terminated(unit.text)?);
    let names = unit.headers.iter().map(|header| terminated(header.0)).collect::<Result<Vec<_>, _>>()?;
    let texts = unit.headers.iter().map(|header| terminated(header.1)).collect::<Result<Vec<_>, _>>()?;
    let options = options.iter().map(|option| terminated(option)).collect::<Result<Vec<_>, _>>()?;
    let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));

    let mut program = Program(null_mut());
    // SAFETY: all strings end in zero and outlive the call; as many headers as names.
    check("start", unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            texts.len() as i32,
            texts.as_ptr(),
            names.as_ptr(),
        )
    })?;
    // SAFETY: the program was made above; the options outlive the call.
    let outcome = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as i32, options.as_ptr()) };
    let log = program.read(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)?;
    let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
    if let Err(error) = check("compilation", outcome) {
        return Err(DeviceError::Unsupported(format!("{}: {error}\n{log}", unit.name)));
    }
    let cubin = program.read(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)?;
    Ok(Compiled { cubin, log })
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

struct Program(sys::nvrtcProgram);

type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Read = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

impl Program {
    fn read(&self, size: Size, read: Read) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = 0;
        // SAFETY: the program is alive and the result outlives the call.
        check("its result's size", unsafe { size(self.0, &mut bytes) })?;
        let mut result = vec![0u8; bytes];
        // SAFETY: the buffer has the size that the library asked for just above.
        check("its result", unsafe { read(self.0, result.as_mut_ptr().cast()) })?;
        Ok(result)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made by `nvrtcCreateProgram` and destroyed once. There is nothing to do about a refusal.
            let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
        }
    }
}

fn check(what: &str, result: sys::nvrtcResult) -> Result<(), DeviceError> {
    if result == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: the library gives a string that ends in zero and lives as long as it does.
    let reason = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) }.to_string_lossy();
    Err(DeviceError::Unsupported(format!("the CUDA compiler library NVRTC failed at {what}: {reason}")))
}
