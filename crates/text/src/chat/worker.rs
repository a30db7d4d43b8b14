//! Templates are rendered in a process of their own.
//!
//! A template is somebody else's program, and its values may be nested without end, shared so that a walk takes for ever, or
//! larger than the memory: what overflows the stack or the memory ends a process, and nothing in it can stop that. So
//! the program starts itself once more, as a worker that renders what it is sent, with as much memory and time as a
//! chat template may need. A worker is kept for the next conversation; one that died is replaced.
//!
//! Whoever links this crate has the worker: it takes over before `main` in a process that was started as one.

use super::jinja::{Context, OwnedContext, Problem, Program};
use crate::TextError;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The name that a worker is started by.
const NAME: &str = "epsmoe: chat template";

/// How long a template may take, beside a second for each megabyte of the conversation.
const TIME: Duration = Duration::from_secs(10);

/// Bytes of address space that a worker may have, beside so many for each byte of the conversation.
const MEMORY: u64 = 1 << 30;
const MEMORY_PER_BYTE: u64 = 64;

/// Workers that wait for the next conversation.
const IDLE: usize = 4;

/// What a worker is told first.
#[derive(Serialize, Deserialize)]
pub(super) struct Setup {
    pub(super) source: String,
    pub(super) tokens: BTreeMap<String, serde_json::Value>,
}

/// The workers of a template.
pub(super) struct Workers {
    setup: Setup,
    idle: Mutex<Vec<Worker>>,
}

/// Why a worker has no answer.
enum Failure {
    /// It says so itself.
    Answered(Problem),
    /// It could not be started.
    Start(io::Error),
    /// It did not answer in time.
    Late,
    /// It died.
    Died(Option<ExitStatus>),
}

impl Workers {
    pub(super) fn new(setup: Setup) -> Self {
        Workers { setup, idle: Mutex::default() }
    }

    /// The template's text.
    pub(super) fn source(&self) -> &str {
        &self.setup.source
    }

    /// The prompt of a conversation, if it has at most `limit` bytes; `file` is the template's, for messages.
    pub(super) fn render(&self, context: &Context, limit: usize, file: &str) -> Result<String, TextError> {
        let message = serde_json::to_vec(context).map_err(|error| TextError::Template {
            file: file.to_owned(),
            problem: format!("this conversation cannot be sent to the template ({error})"),
        })?;
        match self.render_anywhere(&message, limit) {
            Ok(prompt) => Ok(prompt),
            Err(failure) => Err(failure.explained(file, limit)),
        }
    }

    fn render_anywhere(&self, message: &[u8], limit: usize) -> Result<String, Failure> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if let Some(worker) = idle {
            // What an earlier conversation left behind may have been too much for it.
            match self.render_by(worker, message, limit) {
                Err(Failure::Died(_)) => {}
                answer => return answer,
            }
        }
        self.render_by(Worker::start(&self.setup)?, message, limit)
    }

    fn render_by(&self, mut worker: Worker, message: &[u8], limit: usize) -> Result<String, Failure> {
        let answer = worker.render(message, limit);
        if matches!(answer, Ok(_) | Err(Failure::Answered(_))) {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < IDLE {
                idle.push(worker);
            }
        }
        answer
    }
}

impl Failure {
    fn explained(self, file: &str, limit: usize) -> TextError {
        let distrust = "do not trust this model";
        let problem = match self {
            Failure::Answered(Problem::Refused(reason)) => {
                return TextError::Refused { file: file.to_owned(), reason };
            }
            Failure::Answered(Problem::TooLong) => return TextError::TooLong { limit },
            Failure::Answered(Problem::Failed(problem)) => problem,
            Failure::Start(error) => {
                format!("the process that renders the template cannot be started ({error})")
            }
            Failure::Late => format!("the template takes too long and was stopped; {distrust}"),
            Failure::Died(status) => {
                let status = status.and_then(|status| status.signal());
                let signal = status.map(|signal| format!(" (signal {signal})")).unwrap_or_default();
                format!(
                    "the template nests deeper, or takes more memory, than a chat template may, and was \
                     stopped{signal}; {distrust}"
                )
            }
        };
        TextError::Template { file: file.to_owned(), problem }
    }
}

/// A process that renders one template.
struct Worker {
    process: Child,
    stream: UnixStream,
}

impl Worker {
    fn start(setup: &Setup) -> Result<Self, Failure> {
        let setup = serde_json::to_vec(setup).map_err(|error| Failure::Start(error.into()))?;
        let (ours, theirs) = UnixStream::pair().map_err(Failure::Start)?;
        // The file that this process was started from, even if another one has its name by now.
        let process = Command::new("/proc/self/exe")
            .arg0(NAME)
            .stdin(Stdio::from(std::os::fd::OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // Not the terminal's: what interrupts us is not for it.
            .process_group(0)
            .spawn()
            .map_err(Failure::Start)?;
        let mut worker = Worker { process, stream: ours };
        worker.ask(&[&frame(&setup), &setup], time(setup.len()), 0)?;
        Ok(worker)
    }

    fn render(&mut self, message: &[u8], limit: usize) -> Result<String, Failure> {
        let header = [frame(message), (limit as u64).to_le_bytes()].concat();
        self.ask(&[&header, message], time(message.len()), limit)
    }

    /// Sends a message and waits for the answer, of at most `limit` bytes if it is a prompt.
    fn ask(&mut self, message: &[&[u8]], time: Duration, limit: usize) -> Result<String, Failure> {
        let deadline = Instant::now() + time + time / 4;
        let answer = message.iter().try_for_each(|part| write_until(&mut self.stream, part, deadline));
        match answer.and_then(|()| read_answer(&mut self.stream, limit, deadline)) {
            Ok(answer) => answer.map_err(Failure::Answered),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(Failure::Late)
            }
            Err(_) => Err(self.ended(deadline)),
        }
    }

    /// How it ended, now that it does not speak any more.
    fn ended(&mut self, deadline: Instant) -> Failure {
        loop {
            match self.process.try_wait() {
                Ok(Some(status)) if status.code() == Some(LATE) => return Failure::Late,
                Ok(Some(status)) => return Failure::Died(Some(status)),
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                _ => return Failure::Died(None),
            }
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn time(bytes: usize) -> Duration {
    TIME + Duration::from_micros(bytes as u64)
}

fn frame(message: &[u8]) -> [u8; 8] {
    (message.len() as u64).to_le_bytes()
}

/// What is left until a deadline; a timeout of zero would be none.
fn left(deadline: Instant) -> io::Result<Option<Duration>> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(ErrorKind::TimedOut.into()),
        left => Ok(Some(left)),
    }
}

fn write_until(stream: &mut UnixStream, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
    while !bytes.is_empty() {
        stream.set_write_timeout(left(deadline)?)?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_until(stream: &mut UnixStream, bytes: &mut [u8], deadline: Instant) -> io::Result<()> {
    let mut read = 0;
    while read < bytes.len() {
        stream.set_read_timeout(left(deadline)?)?;
        match stream.read(&mut bytes[read..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => read += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Bytes of an error message that are shown; a template may raise one of any length.
const MOST_OF_A_PROBLEM: usize = 2000;

fn read_answer(
    stream: &mut UnixStream,
    limit: usize,
    deadline: Instant,
) -> io::Result<Result<String, Problem>> {
    let mut head = [0; 9];
    read_until(stream, &mut head, deadline)?;
    let [kind, length @ ..] = head;
    let limit = if kind == PROMPT { limit } else { MOST_OF_A_PROBLEM };
    let length = usize::try_from(u64::from_le_bytes(length)).ok().filter(|&length| length <= limit);
    let mut text = vec![0; length.ok_or(ErrorKind::InvalidData)?];
    read_until(stream, &mut text, deadline)?;
    let text = String::from_utf8(text).map_err(|_| ErrorKind::InvalidData)?;
    Ok(match kind {
        PROMPT => Ok(text),
        REFUSED => Err(Problem::Refused(text)),
        TOO_LONG => Err(Problem::TooLong),
        _ => Err(Problem::Failed(text)),
    })
}

// ---- in the worker -----------------------------------------------------------------------------------------

/// What an answer is.
const PROMPT: u8 = 0;
const REFUSED: u8 = 1;
const TOO_LONG: u8 = 2;
const FAILED: u8 = 3;

/// The code that a worker ends with when its time is over.
const LATE: i32 = 3;

/// Takes over in a process that was started as a worker, before its `main`.
#[ctor::ctor(unsafe)]
fn work_if_asked() {
    if std::env::args_os().next().is_some_and(|name| name == NAME) {
        // However it ends, whoever started it sees that.
        std::process::exit(i32::from(std::panic::catch_unwind(work).is_err()));
    }
}

/// Renders what comes, until nothing does.
fn work() -> io::Result<()> {
    let mut stream = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // A system that is short of memory takes this process first.
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let size = read_length(&mut stream)?;
    let message = read_message(&mut stream, size)?;
    let setup: Setup = serde_json::from_slice(&message)?;
    let program = in_time(message.len(), || Program::new(&setup.source, setup.tokens));
    let mut program = match program {
        Ok(program) => program,
        Err(problem) => return answer(&mut stream, Err(problem)),
    };
    answer(&mut stream, Ok(String::new()))?;
    loop {
        let size = read_length(&mut stream)?;
        let limit = read_length(&mut stream)?;
        let message = read_message(&mut stream, size)?;
        let rendered = in_time(size, || {
            let context: OwnedContext =
                serde_json::from_slice(&message).map_err(|error| Problem::Failed(error.to_string()))?;
            program.render(context, size, limit)
        });
        answer(&mut stream, rendered)?;
    }
}

/// Does something that ends the process if it takes too long, and with memory for `size` bytes.
fn in_time<T>(size: usize, work: impl FnOnce() -> T) -> T {
    // Sanitizers take terabytes of address space for themselves.
    if !cfg!(fuzzing) {
        let maximum = getrlimit(Resource::As).maximum;
        let wanted = MEMORY.saturating_add((size as u64).saturating_mul(MEMORY_PER_BYTE));
        let current = Some(maximum.map_or(wanted, |maximum| maximum.min(wanted)));
        let _ = setrlimit(Resource::As, Rlimit { current, maximum });
    }
    let (done, waiting) = sync_channel::<()>(1);
    let watch = std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        if waiting.recv_timeout(time(size)) == Err(RecvTimeoutError::Timeout) {
            std::process::exit(LATE);
        }
    });
    let result = work();
    drop(done);
    if let Ok(watch) = watch {
        let _ = watch.join();
    }
    result
}

fn read_length(stream: &mut UnixStream) -> io::Result<usize> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    usize::try_from(u64::from_le_bytes(length)).map_err(|_| ErrorKind::InvalidData.into())
}

fn read_message(stream: &mut UnixStream, length: usize) -> io::Result<Vec<u8>> {
    let mut message = vec![0; length];
    stream.read_exact(&mut message)?;
    Ok(message)
}

fn answer(stream: &mut UnixStream, rendered: Result<String, Problem>) -> io::Result<()> {
    let (kind, text) = match rendered {
        Ok(prompt) => (PROMPT, prompt),
        Err(Problem::Refused(reason)) => (REFUSED, cut(reason)),
        Err(Problem::TooLong) => (TOO_LONG, String::new()),
        Err(Problem::Failed(problem)) => (FAILED, cut(problem)),
    };
    stream.write_all(&[&[kind][..], &frame(text.as_bytes())].concat())?;
    stream.write_all(text.as_bytes())
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MOST_OF_A_PROBLEM));
    text
}
