//! Files that nobody has to trust, and files that are whole or not there.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Opens a plain file and tells its length. Pipes and devices are refused: reading one may never end.
pub fn open_plain(path: &Path) -> io::Result<(File, u64)> {
    // Opening a pipe may wait for somebody to write to it, so what it is comes first.
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::other("this is not a plain file"));
    }
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

/// A whole plain file of at most `most` bytes.
pub fn read_plain(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let (file, length) = open_plain(path)?;
    if length > most {
        let problem = format!("{length} bytes are more than such a file may have ({most})");
        return Err(io::Error::other(problem));
    }
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The same as text.
pub fn read_plain_text(path: &Path, most: u64) -> io::Result<String> {
    String::from_utf8(read_plain(path, most)?).map_err(|_| io::Error::other("this is not UTF-8 text"))
}

/// Writes a whole file or none: beside its place first, then renamed. What is no file, like a pipe, is written
/// straight to.
pub fn write_whole(path: &Path, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    if is_special(path) {
        return OpenOptions::new().write(true).open(path).and_then(|file| fill(file, write));
    }
    let part = part_beside(path);
    let file = OpenOptions::new().write(true).create_new(true).open(&part)?;
    let written = fill(file, write).and_then(|()| std::fs::rename(&part, path));
    if written.is_err() {
        // What cannot be removed either is not worth another message.
        let _ = std::fs::remove_file(&part);
    }
    written
}

/// Refuses a place where [`write_whole`] could not write a small file now: no folder, no permission, a name that is too
/// long, a full disk. Nothing stays there.
pub fn check_place(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => return Err(ErrorKind::IsADirectory.into()),
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(_) | Err(_) => {}
    }
    if path.file_name().is_none() {
        return Err(ErrorKind::IsADirectory.into());
    }
    if is_special(path) {
        return OpenOptions::new().append(true).open(path).map(drop);
    }
    let part = part_beside(path);
    let file = OpenOptions::new().write(true).create_new(true).open(&part)?;
    let tried = fill(file, |file| file.write_all(&[0; 4096]));
    tried.and(std::fs::remove_file(&part))
}

/// Whether there is something that is neither a file nor a folder.
fn is_special(path: &Path) -> bool {
    let special = |metadata: Metadata| !metadata.is_file() && !metadata.is_dir();
    std::fs::metadata(path).is_ok_and(special)
}

/// Ends the names of files that are not whole.
pub const PART: &str = ".part";

/// A name of its own in the folder of `path`. It is short whatever the other is, whose length may be all that a file
/// system allows.
fn part_beside(path: &Path) -> PathBuf {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".epsmoe-{}-{number}{PART}", std::process::id()))
}

fn fill(file: File, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, file);
    write(&mut file)?;
    let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
    match file.sync_all() {
        // Pipes and terminals cannot be synchronised.
        Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        synced => synced,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names in a folder.
    fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn files_are_whole_or_not_there() {
        let folder = std::env::temp_dir().join(format!("epsmoe-files-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let longest = "n".repeat(255);
        write_whole(&folder.join(&longest), |out| out.write_all(b"all")).unwrap();
        assert_eq!(names(&folder), std::slice::from_ref(&longest));
        let failed = write_whole(&folder.join(&longest), |out| {
            out.write_all(b"half")?;
            Err(io::Error::other("the disk is gone"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the disk is gone");
        assert_eq!(std::fs::read(folder.join(&longest)).unwrap(), b"all");
        assert_eq!(names(&folder).len(), 1, "no part is left");

        let refused = |path: &Path| check_place(path).unwrap_err().kind();
        check_place(&folder.join("new")).unwrap();
        check_place(&folder.join(&longest)).unwrap();
        check_place(Path::new("/dev/null")).unwrap();
        assert_eq!(names(&folder).len(), 1, "nothing stays");
        assert_eq!(refused(&folder), ErrorKind::IsADirectory);
        assert_eq!(refused(&folder.join("..")), ErrorKind::IsADirectory);
        assert_eq!(refused(&folder.join("n".repeat(256))), ErrorKind::InvalidFilename);
        assert_eq!(refused(&folder.join("nowhere/file")), ErrorKind::NotFound);
        assert_eq!(refused(&folder.join(&longest).join("file")), ErrorKind::NotADirectory);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_may_never_end_is_not_read() {
        let refused = |path: &str| read_plain(Path::new(path), 10).unwrap_err().to_string();
        assert_eq!(refused("/dev/zero"), "this is not a plain file");
        assert_eq!(refused("/"), "this is not a plain file");
        assert!(refused("/proc/self/exe").contains("more than such a file may have (10)"));
        assert_eq!(read_plain(Path::new("/nowhere"), 10).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
