//! SIGINT and SIGTERM.

use std::{fmt, future, io};

use tokio::signal::unix::{self, SignalKind};

/// A request to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: Ctrl-C.
    Interrupt,
    /// SIGTERM: a supervisor.
    Terminate,
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Interrupt => "SIGINT",
            Self::Terminate => "SIGTERM",
        })
    }
}

/// Receives signals from its making on, so that one that comes while the process still starts is not lost, and a second
/// one can cut a drain short.
#[derive(Debug)]
pub struct Signals {
    interrupt: unix::Signal,
    terminate: unix::Signal,
}

impl Signals {
    /// Takes the signals over from the default action, which would end the process. Needs a runtime with I/O.
    ///
    /// # Errors
    /// If the system refuses the handler.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            interrupt: unix::signal(SignalKind::interrupt())?,
            terminate: unix::signal(SignalKind::terminate())?,
        })
    }

    /// The next signal. Cancel-safe: what has not been received yet comes at the next call. Signals of one kind that come
    /// before the first is received are one.
    pub async fn recv(&mut self) -> Signal {
        tokio::select! {
            Some(()) = self.interrupt.recv() => Signal::Interrupt,
            Some(()) = self.terminate.recv() => Signal::Terminate,
            else => future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::process::{Signal as Raw, getpid, kill_process};

    use super::*;

    #[tokio::test]
    async fn signals_are_received_from_installation_on() {
        let mut signals = Signals::install().unwrap();
        kill_process(getpid(), Raw::TERM).unwrap();
        assert_eq!(signals.recv().await, Signal::Terminate);
        kill_process(getpid(), Raw::INT).unwrap();
        assert_eq!(signals.recv().await, Signal::Interrupt);
    }
}
