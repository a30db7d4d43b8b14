//! Structs that the host fills and kernels read are written twice, in Rust and in CUDA C++; both must lay them out alike.
//!
//! [`twin!`] keeps where Rust puts every field of such a struct. The sources are compiled with assertions about their
//! side of it, so a twin that differs in a size, an offset or a name does not compile.

use super::report::Report;
use super::{driver, hopper, launch, probe, report, weights};
use std::fmt::Write;

/// Where Rust puts the fields of a struct.
pub(super) struct Layout {
    /// The source file that the twin stands in, and its name there.
    pub(super) file: &'static str,
    pub(super) twin: &'static str,
    pub(super) size: usize,
    pub(super) fields: &'static [Field],
}

/// A field's name, offset and size, in bytes.
pub(super) struct Field(pub(super) &'static str, pub(super) usize, pub(super) usize);

/// A struct with a twin: `struct Name = "Twin" in "file.cu" { fields }`. All are plain data that a kernel may be given.
macro_rules! twin {
    (
        $visible:vis struct $name:ident = $twin:literal in $file:literal {
            $($(#[$about:meta])* $field_visible:vis $field:ident: $type:ty,)*
        }
    ) => {
        #[doc = concat!("The twin of `", $twin, "` in `", $file, "`.")]
        #[repr(C)]
        #[derive(Clone, Copy)]
        $visible struct $name {
            $($(#[$about])* $field_visible $field: $type,)*
        }

        impl $name {
            /// What the twin is held against.
            pub(in crate::cuda) const LAYOUT: &$crate::cuda::layout::Layout = &$crate::cuda::layout::Layout {
                file: $file,
                twin: $twin,
                size: size_of::<$name>(),
                fields: &[$($crate::cuda::layout::Field(
                    stringify!($field),
                    std::mem::offset_of!($name, $field),
                    size_of::<$type>(),
                ),)*],
            };
        }
    };
}
pub(super) use twin;

/// C++ that does not compile where the structs of a source file, or its causes of complaint, are not those of Rust.
/// `__INTADDR__` is how NVRTC spells `offsetof`, which it has not.
pub(super) fn checks(file: &str) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    if file == Report::LAYOUT.file {
        for (name, number) in report::CAUSES {
            let _ =
                writeln!(text, "static_assert({name} == {number}, \"cause {name} is {number} in Rust\");");
        }
    }
    let layouts = [
        driver::LAYOUTS,
        launch::LAYOUTS,
        hopper::LAYOUTS,
        report::LAYOUTS,
        probe::LAYOUTS,
        weights::LAYOUTS,
    ];
    for layout in layouts.into_iter().flatten().filter(|layout| layout.file == file) {
        let Layout { twin, size, .. } = layout;
        let _ =
            writeln!(text, "static_assert(sizeof({twin}) == {size}, \"{twin} has {size} bytes in Rust\");");
        for Field(field, offset, bytes) in layout.fields {
            let _ = writeln!(
                text,
                "static_assert(__INTADDR__(&(({twin}*)0)->{field}) == {offset} && sizeof({twin}::{field}) == {bytes}, \
                 \"{twin}.{field} has {bytes} bytes from {offset} on in Rust\");"
            );
        }
    }
    text
}
