//! How processes become a world, and who does not get in. The processes are threads here; that a process that ends is
//! noticed is tested with real ones, in the room that starts them.

use epsmoe_base::{FaultCell, Mix, Place, Rank, env::test_seed};
use epsmoe_fabric::process::{Lobby, Processes, RendezvousError, Secret, WorldOptions, join};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const HERE: &str = "127.0.0.1";

fn secret() -> Secret {
    Secret::chosen("the secret of this test").expect("long enough")
}

/// What a process of that secret starts with.
fn options() -> WorldOptions {
    WorldOptions {
        patience: Duration::from_secs(20),
        timeout: Duration::from_secs(20),
        faults: FaultCell::default(),
        secret: secret(),
        version: "1".into(),
        flags: None,
    }
}

type Joined = Result<(Processes, String), RendezvousError>;

fn guest(port: u16, rank: usize, options: WorldOptions) -> JoinHandle<Joined> {
    std::thread::spawn(move || join((HERE, port), Rank(rank), None, &options))
}

fn lobby(size: usize, options: WorldOptions) -> (Lobby, u16) {
    let lobby = Lobby::open((HERE, 0), size, options).expect("a free port");
    let port = lobby.address().port();
    (lobby, port)
}

fn why<T>(result: Result<T, RendezvousError>) -> String {
    result.err().expect("a refusal").to_string()
}

fn wait(lobby: Lobby) -> Result<Processes, RendezvousError> {
    lobby.wait("a charter", || Ok(()))
}

#[test]
fn all_come_and_write_to_each_other() {
    let (lobby, port) = lobby(3, options());
    // One comes late.
    let guests = [2, 1].map(|rank| {
        std::thread::sleep(Duration::from_millis(100));
        guest(port, rank, options())
    });
    let host = wait(lobby).unwrap();
    let guests = guests.map(|guest| guest.join().unwrap().unwrap());
    assert_eq!(host.members().len(), 3);
    for (process, charter) in &guests {
        assert_eq!(charter, "a charter");
        host.send(process.rank(), format!("to {}", process.rank()).as_bytes()).unwrap();
        process.send(Rank(0), b"first").unwrap();
        process.send(Rank(0), &vec![7; 3 << 20]).unwrap();
    }
    for (process, _) in &guests {
        let rank = process.rank();
        assert_eq!(process.receive(Rank(0)).unwrap(), Some(format!("to {rank}").into_bytes()));
        assert_eq!(host.receive(rank).unwrap(), Some(b"first".to_vec()));
        assert_eq!(host.receive(rank).unwrap(), Some(vec![7; 3 << 20]));
    }
    // The world ends in peace.
    drop(host);
    for (process, _) in &guests {
        assert_eq!(process.receive(Rank(0)).unwrap(), None);
    }
}

#[test]
fn who_does_not_come_is_named() {
    let short = WorldOptions { patience: Duration::from_millis(300), ..options() };
    let (lobby, port) = lobby(4, short);
    let guest = guest(port, 2, options());
    let _ = TcpStream::connect((HERE, port)).unwrap().write_all(&[0; 100]);
    let told = why(wait(lobby));
    let begin = format!(
        "ranks 1, 3 did not come to {HERE}:{port} within 300ms; one caller was without the secret of this world \
         (EPSMOE_SECRET) turned away: "
    );
    assert!(told.starts_with(&begin), "{told}");
    assert_eq!(why(guest.join().unwrap()), told);
}

#[test]
fn another_secret_gets_nobody_in() {
    let (lobby, port) = lobby(2, options());
    let other = WorldOptions { secret: Secret::chosen("another secret").unwrap(), ..options() };
    let stranger = guest(port, 1, other);
    let told = why(stranger.join().unwrap());
    assert_eq!(
        told,
        format!(
            "rank 1 cannot join rank 0 at {HERE}:{port}: it has another secret: export the same EPSMOE_SECRET to all \
             ranks"
        )
    );
    // The world does not mind.
    let guest = guest(port, 1, options());
    assert!(wait(lobby).is_ok() && guest.join().unwrap().is_ok());
}

#[test]
fn a_rank_that_comes_twice_is_sent_away() {
    let (lobby, port) = lobby(3, options());
    let first = guest(port, 1, options());
    std::thread::sleep(Duration::from_millis(200));
    let told = why(guest(port, 1, options()).join().unwrap());
    assert!(told.starts_with("rank 1 is there already: rank 1 (process "), "{told}");
    let other = guest(port, 2, options());
    let host = wait(lobby).unwrap();
    let (_first, _other) = (first.join().unwrap().unwrap(), other.join().unwrap().unwrap());
    let told = why(guest(port, 2, options()).join().unwrap());
    assert!(told.starts_with("rank 2 is there already: rank 2 (process "), "{told}");
    let told = why(guest(port, 3, options()).join().unwrap());
    assert_eq!(told, "there is no rank 3: the world has all its 3 ranks");
    drop(host);
}

#[test]
fn ranks_that_differ_are_named() {
    let version = WorldOptions { version: "2".into(), ..options() };
    let flags = WorldOptions { flags: Some(5), ..options() };
    for (other, words) in [(version, "runs epsmoe 2, rank 0 runs 1"), (flags, "was started with other flags")]
    {
        let (lobby, port) = lobby(2, WorldOptions { flags: Some(4), ..options() });
        let guest = guest(port, 1, other);
        let told = why(wait(lobby));
        assert!(told.starts_with("rank 1 (process ") && told.contains(words), "{told}");
        assert_eq!(why(guest.join().unwrap()), told);
    }
    let (lobby, port) = lobby(2, options());
    let guest = std::thread::spawn(move || join((HERE, port), Rank(1), Some(4), &options()));
    let told = why(wait(lobby));
    assert!(told.contains("came as rank 1 of 4, but the flags of rank 0 make a world of 2 ranks"), "{told}");
    assert_eq!(why(guest.join().unwrap()), told);
}

/// Whatever comes to the port, before the world is there and while it runs, does nothing to it.
#[test]
fn garbage_on_the_port_disturbs_nobody() {
    let seed = test_seed();
    let (lobby, port) = lobby(2, options());
    let throw = move |round: u64| {
        let mut mix = Mix::keyed(seed, &[round]);
        let mut stream = TcpStream::connect((HERE, port)).unwrap();
        let mut garbage: Vec<u8> = (0..mix.below(300)).map(|_| mix.below(256) as u8).collect();
        if round.is_multiple_of(2) {
            // It begins as one of us would.
            garbage.splice(0..0, *b"epsmoe\0\x01");
        }
        // The other side may close at any time.
        let _ = stream.write_all(&garbage);
        if round.is_multiple_of(3) {
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
        stream
    };
    let thrown: Vec<TcpStream> = (0..40).map(throw).collect();
    std::thread::sleep(Duration::from_millis(100));
    drop(thrown);
    let guest = guest(port, 1, options());
    let host = wait(lobby).unwrap();
    let (guest, _) = guest.join().unwrap().unwrap();
    let silent: Vec<TcpStream> = (40..60).map(throw).collect();
    let other = std::thread::spawn(move || {
        (0..50).for_each(|_| guest.control().barrier(Place::default()).unwrap());
        guest
    });
    (0..50).for_each(|_| host.control().barrier(Place::default()).unwrap());
    let _guest = other.join().unwrap();
    assert_eq!(host.faults().get(), None, "seed {seed}");
    drop(silent);
}

/// Carries a connection to rank 0 and back, and spoils some of what the guest says after `whole` bytes.
fn spoiling(to: u16, whole: usize, mut mix: Mix) -> u16 {
    let listener = TcpListener::bind((HERE, 0)).expect("a free port");
    let port = listener.local_addr().expect("an address").port();
    std::thread::spawn(move || {
        let guest = listener.accept()?.0;
        let host = TcpStream::connect((HERE, to))?;
        let back = (host.try_clone()?, guest.try_clone()?);
        std::thread::spawn(move || std::io::copy(&mut &back.0, &mut &back.1));
        let (mut carried, mut bytes) = (0, [0; 64]);
        loop {
            let read = (&guest).read(&mut bytes)?;
            if read == 0 {
                return host.shutdown(std::net::Shutdown::Write);
            }
            for (at, byte) in bytes[..read].iter_mut().enumerate() {
                if carried + at >= whole && mix.below(8) == 0 {
                    *byte = mix.below(256) as u8;
                }
            }
            carried += read;
            (&host).write_all(&bytes[..read])?;
        }
    });
    port
}

/// What somebody says who knows the secret, or who sits between two who do, stops the world by name or is refused; nothing
/// hangs, panics or takes memory for it.
#[test]
fn spoilt_messages_of_a_rank_stop_the_world() {
    let seed = test_seed();
    let (mut refused, mut stopped) = (0, 0);
    for round in 0..24 {
        let mut mix = Mix::keyed(seed, &[round]);
        let short =
            WorldOptions { patience: Duration::from_secs(1), timeout: Duration::from_secs(1), ..options() };
        let begun = Instant::now();
        let (lobby, port) = lobby(2, short.clone());
        // In the handshake, in the hello, or in messages of the world.
        let whole = mix.below(600);
        let guest = guest(spoiling(port, whole, mix.clone()), 1, short);
        let Ok(host) = wait(lobby) else {
            refused += 1;
            assert!(guest.join().expect("no panic").is_err(), "seed {seed}, round {round}");
            continue;
        };
        let talk = |processes: Processes| {
            let letters = (0..40).try_for_each(|_| {
                processes.control().exchange("news", Place::default(), vec![7; 30])?;
                processes.send(Rank(1 - processes.rank().0), &[1; 20])
            });
            letters.is_err()
        };
        let other = std::thread::spawn(move || guest.join().expect("no panic").map(|(guest, _)| talk(guest)));
        let failed = talk(host);
        let other = other.join().expect("no panic");
        stopped += usize::from(failed || other.unwrap_or(true));
        assert!(
            begun.elapsed() < Duration::from_secs(12),
            "seed {seed}, round {round}: {:?}",
            begun.elapsed()
        );
    }
    assert!(refused > 0 && stopped > 5, "seed {seed}: {refused} refused, {stopped} stopped");
}

/// A process whose connection closes without a goodbye has ended, and everybody hears its name.
#[test]
fn who_leaves_without_a_word_stops_the_world() {
    let (lobby, port) = lobby(3, options());
    // It does not know what to say after the rendezvous: a copy of the handshake of a rank that then dies.
    let program = std::env::current_exe().unwrap();
    let mut child = std::process::Command::new(program)
        .args(["a_rank_that_dies", "--exact", "--ignored", "--nocapture"])
        .env("EPSMOE_TEST_PORT", port.to_string())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let other = guest(port, 1, options());
    let host = wait(lobby).unwrap();
    let (other, _) = other.join().unwrap().unwrap();
    let begun = Instant::now();
    child.kill().unwrap();
    child.wait().unwrap();
    let words = format!("rank 2 (process {} on ", child.id());
    for process in [host, other] {
        let fault = process.control().exchange("news", Place::default(), vec![]).unwrap_err();
        assert!(fault.message.starts_with(&words), "{fault}");
        assert!(fault.message.ends_with("has ended: its connection is closed"), "{fault}");
    }
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// A part of the test above, in a process of its own.
#[test]
#[ignore = "started by another test"]
fn a_rank_that_dies() {
    let Some(port) = epsmoe_base::env::text("EPSMOE_TEST_PORT") else { return };
    let _world = join((HERE, port.parse().unwrap()), Rank(2), None, &options()).unwrap();
    // Until it is killed, or its parent is gone.
    let _ = std::io::stdin().read(&mut [0]);
    std::thread::sleep(Duration::from_secs(60));
}
