//! Two processes show each other that they know the same secret, without saying it.

use super::frames::Hurried;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// What both sides say first: a name, and the version of what follows.
const MAGIC: [u8; 8] = *b"epsmoe\0\x01";

/// A proof was right, or not.
const WELCOME: u8 = 1;
const TURNED_AWAY: u8 = 0;

/// How long a stranger may take to prove that it is none.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// What the processes of a world know and nobody else does.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Fewest characters of a secret that people choose.
    pub const SHORTEST: usize = 8;

    /// A secret that somebody chose.
    ///
    /// # Errors
    /// It could be guessed.
    pub fn chosen(text: &str) -> Result<Self, String> {
        if text.chars().count() < Self::SHORTEST {
            return Err(format!(
                "the secret has fewer than {} characters: take a random one, like `openssl rand -hex 16` gives",
                Self::SHORTEST
            ));
        }
        Ok(Secret(text.to_owned()))
    }

    /// A new one.
    ///
    /// # Errors
    /// The system gives no random bytes.
    pub fn random() -> io::Result<Self> {
        Ok(Secret(random()?.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The secret itself, for the environment of a process that is to know it.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What only who knows the secret can make of these words.
    fn proof(&self, role: &[u8], nonces: &[Nonce; 2]) -> Hmac<Sha256> {
        let mut proof = Hmac::<Sha256>::new_from_slice(self.0.as_bytes()).unwrap_or_else(|_| {
            // Keys of any length are keys.
            unreachable!("a secret that is no key. This is a bug.")
        });
        [role, &nonces[0], &nonces[1]].iter().for_each(|part| proof.update(part));
        proof
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Drawn for one connection.
type Nonce = [u8; 32];

fn random() -> io::Result<Nonce> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(bytes)
}

/// Why two processes do not talk to each other.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Turned {
    /// The other side is something else.
    #[error("something else than epsmoe answers there")]
    Stranger,
    /// It is a process of another world.
    #[error("the secrets differ")]
    Secret,
    /// The connection broke.
    #[error(transparent)]
    Broken(#[from] io::Error),
}

/// The side that was connected to: lets in who knows the secret.
pub(crate) fn let_in(stream: &TcpStream, secret: &Secret) -> Result<(), Turned> {
    let mut stream = Hurried { stream, until: Instant::now() + PATIENCE };
    let mine = random()?;
    stream.write_all(&[&MAGIC[..], &mine].concat())?;
    let (theirs, proof) = (expect_magic(&mut stream)?, read_array::<32>(&mut stream)?);
    let nonces = [mine, theirs];
    if secret.proof(b"joins", &nonces).verify_slice(&proof).is_err() {
        stream.write_all(&[TURNED_AWAY])?;
        return Err(Turned::Secret);
    }
    let mut answer = vec![WELCOME];
    answer.extend(secret.proof(b"lets in", &nonces).finalize().into_bytes());
    Ok(stream.write_all(&answer)?)
}

/// The side that connected: shows that it knows the secret, and sees whether the other side does.
pub(crate) fn knock(stream: &TcpStream, secret: &Secret) -> Result<(), Turned> {
    let mut stream = Hurried { stream, until: Instant::now() + PATIENCE };
    let theirs = expect_magic(&mut stream)?;
    let nonces = [theirs, random()?];
    let mut words = [&MAGIC[..], &nonces[1]].concat();
    words.extend(secret.proof(b"joins", &nonces).finalize().into_bytes());
    stream.write_all(&words)?;
    let [answer] = read_array::<1>(&mut stream)?;
    if answer != WELCOME {
        return Err(Turned::Secret);
    }
    let proof = read_array::<32>(&mut stream)?;
    secret.proof(b"lets in", &nonces).verify_slice(&proof).map_err(|_| Turned::Secret)
}

fn expect_magic(stream: &mut impl Read) -> Result<Nonce, Turned> {
    if read_array::<8>(stream)? == MAGIC { Ok(read_array(stream)?) } else { Err(Turned::Stranger) }
}

fn read_array<const N: usize>(stream: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    match stream.read_exact(&mut bytes) {
        // What a read that has waited long enough gives depends on the system.
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err(ErrorKind::TimedOut.into()),
        read => read.map(|()| bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// What both sides think of each other.
    fn meet(inside: &str, outside: &str) -> (Result<(), Turned>, Result<(), Turned>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let outside = Secret::chosen(outside).unwrap();
        let other = std::thread::spawn(move || knock(&TcpStream::connect(address).unwrap(), &outside));
        let let_in = let_in(&listener.accept().unwrap().0, &Secret::chosen(inside).unwrap());
        (let_in, other.join().unwrap())
    }

    #[test]
    fn who_knows_the_secret_is_let_in() {
        let (inside, outside) = meet("a long secret", "a long secret");
        assert!(inside.is_ok() && outside.is_ok());
        let (inside, outside) = meet("a long secret", "a long secreT");
        assert!(matches!((inside, outside), (Err(Turned::Secret), Err(Turned::Secret))));
        assert!(Secret::chosen("short").is_err());
        assert_ne!(Secret::random().unwrap(), Secret::random().unwrap());
    }

    /// A host that does not know the secret does not learn it, nor is it obeyed.
    #[test]
    fn who_lets_in_must_know_the_secret_too() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let other = std::thread::spawn(move || {
            knock(&TcpStream::connect(address).unwrap(), &Secret::chosen("a long secret").unwrap())
        });
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[&MAGIC[..], &[5; 32]].concat()).unwrap();
        stream.read_exact(&mut [0; 72]).unwrap();
        stream.write_all(&[&[WELCOME][..], &[7; 32]].concat()).unwrap();
        assert!(matches!(other.join().unwrap(), Err(Turned::Secret)));
    }

    #[test]
    fn other_programs_are_strangers() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let other = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(&[b'G'; 200]).unwrap();
            // It hears who is here, and nothing else.
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard);
            assert!(heard.len() <= 40, "{heard:?}");
        });
        let secret = Secret::chosen("a long secret").unwrap();
        assert!(matches!(let_in(&listener.accept().unwrap().0, &secret), Err(Turned::Stranger)));
        other.join().unwrap();
    }
}
