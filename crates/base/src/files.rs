//! Small files that nobody has to trust.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_never_end_is_not_read() {
        let refused = |path: &str| read_plain(Path::new(path), 10).unwrap_err().to_string();
        assert_eq!(refused("/dev/zero"), "this is not a plain file");
        assert_eq!(refused("/"), "this is not a plain file");
        assert!(refused("/proc/self/exe").contains("more than such a file may have (10)"));
        assert_eq!(read_plain(Path::new("/nowhere"), 10).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
