//! Descriptors that `"fd": N` can name: those a request came with, or those this process was
//! started with. Each is claimed once; what is not claimed is closed with the whole.

use std::fmt;
use std::os::fd::{OwnedFd, RawFd};

use super::fd;

/// Most descriptors that may come with one request.
pub const PASSED_MAX: usize = 32;

/// What there is to claim.
#[derive(Debug)]
pub enum Passed {
    /// All that the process was started with, by the numbers they have there.
    Inherited,
    /// What came with a request, in its order; a place is empty once it was claimed.
    Received(Vec<Option<OwnedFd>>),
    /// What came with a request cannot be used, and why. None of it is open any more.
    Refused(PassedError),
}

impl Default for Passed {
    fn default() -> Self {
        Passed::Received(Vec::new())
    }
}

/// Why there is no such descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassedError {
    /// Fewer came with the request.
    Missing {
        /// The one that was named.
        number: u32,
        /// How many came.
        count: usize,
    },
    /// It was named before.
    ClaimedTwice(u32),
    /// The process was not started with it.
    NotOpen(u32),
    /// The process opened it itself, or it was named before.
    NotPassed(u32),
    /// More came with the request than may.
    TooMany,
    /// The host could not give them to this process.
    Lost,
    /// Too many other requests with descriptors are half sent.
    Crowded,
}

impl fmt::Display for PassedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PassedError::Missing { number, count } => write!(
                f,
                "There is no descriptor {number}: {count} came with the first byte of the request, \
                 counted from 0"
            ),
            PassedError::ClaimedTwice(number) => {
                write!(f, "Descriptor {number} is named twice in one request")
            }
            PassedError::NotOpen(number) => write!(f, "Descriptor {number} is not open"),
            PassedError::NotPassed(number) => write!(
                f,
                "Descriptor {number} was not passed to this process, or is named twice"
            ),
            PassedError::TooMany => write!(
                f,
                "More than {PASSED_MAX} descriptors came with the request; all of them were closed"
            ),
            PassedError::Lost => f.write_str(
                "Not all descriptors that came with the request could be taken: this process has \
                 reached its limit of open files",
            ),
            PassedError::Crowded => f.write_str(
                "The descriptors that came with the request were closed: too many other requests \
                 with descriptors are half sent",
            ),
        }
    }
}

impl std::error::Error for PassedError {}

impl Passed {
    /// Descriptor `number`, which is the caller's from now on.
    ///
    /// # Errors
    /// There is none of that number, or it was claimed before.
    pub fn claim(&mut self, number: u32) -> Result<OwnedFd, PassedError> {
        match self {
            Passed::Inherited => {
                let fd = RawFd::try_from(number).map_err(|_| PassedError::NotOpen(number))?;
                fd::take_over(fd).map_err(|cause| match cause {
                    Some(_) => PassedError::NotOpen(number),
                    None => PassedError::NotPassed(number),
                })
            }
            Passed::Received(received) => {
                let count = received.len();
                usize::try_from(number)
                    .ok()
                    .and_then(|place| received.get_mut(place))
                    .ok_or(PassedError::Missing { number, count })?
                    .take()
                    .ok_or(PassedError::ClaimedTwice(number))
            }
            Passed::Refused(error) => Err(*error),
        }
    }

    /// Whether a descriptor is open in it, which nothing has claimed.
    pub fn holds_any(&self) -> bool {
        matches!(self, Passed::Received(received) if received.iter().any(Option::is_some))
    }

    /// Whether anything came with the request.
    pub fn is_empty(&self) -> bool {
        matches!(self, Passed::Received(received) if received.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn claim_when_received_gives_each_once() {
        let (a, b) = fd::pipe().unwrap();
        let (first, second) = (a.as_raw_fd(), b.as_raw_fd());
        let mut passed = Passed::Received(vec![Some(a.into()), Some(b.into())]);
        assert!(!passed.is_empty());
        assert!(passed.holds_any() && !Passed::default().holds_any());
        assert_eq!(passed.claim(1).unwrap().as_raw_fd(), second);
        assert_eq!(passed.claim(1).unwrap_err(), PassedError::ClaimedTwice(1));
        assert!(passed.holds_any());
        let missing = |number| PassedError::Missing { number, count: 2 };
        assert_eq!(passed.claim(2).unwrap_err(), missing(2));
        assert_eq!(passed.claim(u32::MAX).unwrap_err(), missing(u32::MAX));
        assert!(fd::is_open(first));
        assert_eq!(
            Passed::default().claim(0).unwrap_err().to_string(),
            "There is no descriptor 0: 0 came with the first byte of the request, counted from 0"
        );
    }

    #[test]
    fn claim_when_inherited_takes_what_was_handed_in_only() {
        let (ours, _) = fd::pipe().unwrap();
        let number = u32::try_from(ours.as_raw_fd()).unwrap();
        let mut passed = Passed::Inherited;
        assert_eq!(
            passed.claim(number).unwrap_err(),
            PassedError::NotPassed(number)
        );
        for number in [1 << 20, u32::MAX] {
            assert_eq!(
                passed.claim(number).unwrap_err(),
                PassedError::NotOpen(number)
            );
        }
        assert!(passed.claim(2).is_ok());
    }

    #[test]
    fn claim_when_refused_says_why() {
        let mut passed = Passed::Refused(PassedError::TooMany);
        assert!(!passed.is_empty());
        assert_eq!(passed.claim(0).unwrap_err(), PassedError::TooMany);
    }
}
