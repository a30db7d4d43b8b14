//! Files made by hand, honest or not.

/// A GGUF file to be.
pub(crate) struct Builder {
    version: u32,
    keys: Vec<Vec<u8>>,
    table: Vec<Vec<u8>>,
    data: Vec<u8>,
    claimed: (Option<u64>, Option<u64>),
}

impl Builder {
    pub(crate) fn new(architecture: &str) -> Builder {
        let keys = vec![kv::text("general.architecture", architecture)];
        Builder { version: 3, keys, table: Vec::new(), data: Vec::new(), claimed: (None, None) }
    }

    pub(crate) fn version(mut self, version: u32) -> Builder {
        self.version = version;
        self
    }

    pub(crate) fn count_tensors(mut self, count: u64) -> Builder {
        self.claimed.0 = Some(count);
        self
    }

    pub(crate) fn count_keys(mut self, count: u64) -> Builder {
        self.claimed.1 = Some(count);
        self
    }

    pub(crate) fn key(mut self, key: Vec<u8>) -> Builder {
        self.keys.push(key);
        self
    }

    /// A tensor after the others, whose dimensions are given fastest first.
    pub(crate) fn tensor(mut self, name: &str, format: u32, dimensions: &[u64], bytes: &[u8]) -> Builder {
        let at = self.data.len() as u64;
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let padded = if bytes.len() < 16 { self.data.len() } else { self.data.len().next_multiple_of(32) };
        self.data.resize(padded, 0);
        self.tensor_at(name, format, dimensions, at)
    }

    /// A tensor that claims to be at a place.
    pub(crate) fn tensor_at(mut self, name: &str, format: u32, dimensions: &[u64], at: u64) -> Builder {
        let mut entry = kv::string(name);
        entry.extend((dimensions.len() as u32).to_le_bytes());
        entry.extend(dimensions.iter().flat_map(|width| width.to_le_bytes()));
        entry.extend(format.to_le_bytes());
        entry.extend(at.to_le_bytes());
        self.table.push(entry);
        self
    }

    pub(crate) fn bytes(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.claimed.0.unwrap_or(self.table.len() as u64).to_le_bytes());
        file.extend(self.claimed.1.unwrap_or(self.keys.len() as u64).to_le_bytes());
        file.extend(self.keys.concat());
        file.extend(self.table.concat());
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }
}

/// Keys with their values.
pub(crate) mod kv {
    pub(crate) fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    pub(crate) fn value(key: &str, kind: u32, bytes: &[u8]) -> Vec<u8> {
        [string(key), kind.to_le_bytes().to_vec(), bytes.to_vec()].concat()
    }

    pub(crate) fn whole(key: &str, number: u32) -> Vec<u8> {
        value(key, 4, &number.to_le_bytes())
    }

    pub(crate) fn number(key: &str, number: f32) -> Vec<u8> {
        value(key, 6, &number.to_le_bytes())
    }

    pub(crate) fn flag(key: &str, flag: bool) -> Vec<u8> {
        value(key, 7, &[flag.into()])
    }

    pub(crate) fn text(key: &str, text: &str) -> Vec<u8> {
        value(key, 8, &string(text))
    }

    pub(crate) fn list(key: &str, kind: u32, count: u64, items: &[u8]) -> Vec<u8> {
        value(key, 9, &[&kind.to_le_bytes(), &count.to_le_bytes()[..], items].concat())
    }

    pub(crate) fn texts(key: &str, texts: &[&str]) -> Vec<u8> {
        let items: Vec<Vec<u8>> = texts.iter().map(|text| string(text)).collect();
        list(key, 8, texts.len() as u64, &items.concat())
    }

    /// Lists within lists, so many.
    pub(crate) fn nested(key: &str, depth: usize) -> Vec<u8> {
        let inner = [&9u32.to_le_bytes(), &1u64.to_le_bytes()[..]].concat().repeat(depth);
        value(key, 9, &[inner, 4u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec()].concat())
    }
}
