//! The processes that the supervisor asked for, and their streams.
//!
//! Nothing here waits. An input that its process does not read yet is held, up to the credit that was given
//! for it; an output is read only for credit, and only into a frame that goes out at once.

use mayfly_agent_protocol::{
    Frame, INPUT_WINDOW, Malformed, Message, OUTPUT_WINDOW, PROCESSES_MAX, Receiver, Sender,
    Status, Stream,
};

use crate::child::{self, Command};
use crate::sys::{self, Errno, Fd, Memory, POLL_IN, POLL_OUT, Poll};

/// Most that can be waited for: two outputs and an input of each process.
pub const POLLED: usize = PROCESSES_MAX * 3;

/// What a process reads.
struct Input {
    fd: Option<Fd>,
    held: Option<Memory>,
    start: usize,
    end: usize,
    credit: Receiver,
    /// No more comes.
    is_ended: bool,
    /// The process does not read any more, which is still to be said.
    is_refused: bool,
}

impl Input {
    fn new(fd: Option<Fd>) -> Self {
        Input {
            fd,
            held: None,
            start: 0,
            end: 0,
            credit: Receiver::new(INPUT_WINDOW),
            is_ended: false,
            is_refused: false,
        }
    }

    fn is_holding(&self) -> bool {
        self.start < self.end
    }

    /// Takes bytes that came.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        self.credit.received(bytes.len())?;
        if let Some(fd) = self.fd.as_ref().filter(|_| self.start == self.end) {
            match sys::write(fd, bytes) {
                Ok(count) => {
                    bytes = &bytes[count.min(bytes.len())..];
                    self.credit.passed_on(count);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => self.refuse(),
            }
        }
        if bytes.is_empty() || self.fd.is_none() {
            return Ok(());
        }
        if self.held.is_none() {
            self.held = Memory::new(INPUT_WINDOW as usize).ok();
        }
        let Some(memory) = &mut self.held else {
            self.refuse();
            return Ok(());
        };
        let room = memory.bytes();
        if room.len() - self.end < bytes.len() {
            room.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        // The credit that was given fits.
        let end = self.end + bytes.len();
        let place = room.get_mut(self.end..end).ok_or(Malformed::Credit)?;
        place.copy_from_slice(bytes);
        self.end = end;
        Ok(())
    }

    /// Passes on what is held.
    fn pass_on(&mut self) {
        if let (Some(fd), Some(memory)) = (&self.fd, &mut self.held)
            && self.start < self.end
        {
            match sys::write(fd, &memory.bytes()[self.start..self.end]) {
                Ok(count) => {
                    self.start += count;
                    self.credit.passed_on(count);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => self.refuse(),
            }
        }
        if !self.is_holding() && self.is_ended {
            self.fd = None;
        }
    }

    /// Nothing reads it any more.
    fn refuse(&mut self) {
        self.is_refused = !self.is_ended;
        self.is_ended = true;
        (self.start, self.end, self.fd, self.held) = (0, 0, None, None);
    }
}

/// What a process writes.
struct Output {
    fd: Option<Fd>,
    credit: Sender,
    /// What may still be read, once the process has ended: others that hold the other end do not
    /// keep it.
    rest: Option<usize>,
}

impl Output {
    fn new(fd: Option<Fd>) -> Self {
        Output {
            fd,
            credit: Sender::new(OUTPUT_WINDOW),
            rest: None,
        }
    }

    /// How much can be read of it now.
    fn wanted(&self) -> usize {
        let most = self.rest.unwrap_or(usize::MAX).min(self.credit.left());
        if self.fd.is_some() { most } else { 0 }
    }

    /// Reads into `frame`.
    fn take(&mut self, process: u32, stream: Stream, frame: &mut Frame) {
        let wanted = self.wanted();
        let Some(fd) = self.fd.as_ref().filter(|_| wanted > 0 && frame.room() > 0) else {
            return;
        };
        match frame.push_data(process, stream, wanted, |place| sys::read(fd, place)) {
            Ok(0) => self.fd = None,
            Ok(count) => {
                self.credit.sent(count);
                if let Some(rest) = &mut self.rest {
                    *rest = rest.saturating_sub(count);
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if self.rest.is_none() => {}
            // A terminal without a process has no more to read.
            Err(_) => self.fd = None,
        }
        if self.rest == Some(0) {
            self.fd = None;
        }
    }

    fn process_ended(&mut self, is_terminal: bool) {
        let Some(fd) = &self.fd else { return };
        let rest = match is_terminal {
            true => usize::MAX,
            false => sys::readable(fd),
        };
        self.rest = Some(rest);
        if rest == 0 {
            self.fd = None;
        }
    }
}

pub struct Process {
    id: u32,
    pid: i32,
    is_terminal: bool,
    input: Input,
    outputs: [Output; 2],
    status: Option<Status>,
}

impl Process {
    /// Adds what has to be said of it; whether it has ended and all was said.
    fn report(&mut self, frame: &mut Frame) -> bool {
        let process = self.id;
        if let Some(bytes) = self.input.credit.due().filter(|_| !self.input.is_ended) {
            let stream = Stream::Input;
            let credit = Message::Credit {
                process,
                stream,
                bytes,
            };
            if frame.push(&credit) {
                self.input.credit.given(bytes);
            }
        }
        if self.input.is_refused {
            let stream = Stream::Input;
            self.input.is_refused = !frame.push(&Message::End { process, stream });
        }
        let is_read = self.outputs.iter().all(|output| output.fd.is_none());
        match self.status.filter(|_| is_read) {
            Some(status) => frame.push(&Message::Exited { process, status }),
            None => false,
        }
    }
}

/// All of them.
pub struct Table {
    places: [Option<Process>; PROCESSES_MAX],
}

impl Table {
    pub const fn new() -> Self {
        Table {
            places: [const { None }; PROCESSES_MAX],
        }
    }

    fn find(&mut self, id: u32) -> Option<&mut Process> {
        self.places.iter_mut().flatten().find(|it| it.id == id)
    }

    /// Starts a process. What cannot be started has the code that a shell gives for that.
    pub fn start(&mut self, id: u32, body: &[u8]) -> Result<(), Malformed> {
        let command = Command::read(body)?;
        if self.find(id).is_some() {
            return Err(Malformed::Reserved);
        }
        // The supervisor asks for no more.
        let place = self.places.iter_mut().find(|place| place.is_none());
        let place = place.ok_or(Malformed::Reserved)?;
        let mut process = Process {
            id,
            pid: 0,
            is_terminal: command.terminal.is_some(),
            input: Input::new(None),
            outputs: [Output::new(None), Output::new(None)],
            status: None,
        };
        match child::start(&command) {
            Ok(child) => {
                process.pid = child.pid;
                process.input.is_ended = child.input.is_none();
                process.input.fd = child.input;
                process.outputs[0].fd = Some(child.output);
                process.outputs[1].fd = child.error;
            }
            Err(_) => process.status = Some(Status::Exited(child::CANNOT_START)),
        }
        *place = Some(process);
        Ok(())
    }

    /// Does what a message about a process asks. One about a process that has ended is late, and nothing.
    pub fn handle(&mut self, message: &Message<'_>) -> Result<(), Malformed> {
        match *message {
            Message::Data {
                process,
                stream: Stream::Input,
                bytes,
            } => {
                if let Some(process) = self.find(process) {
                    return process.input.take(bytes);
                }
            }
            Message::End { process, stream } => {
                let Some(process) = self.find(process) else {
                    return Ok(());
                };
                match stream {
                    Stream::Input => {
                        process.input.is_ended = true;
                        if process.is_terminal {
                            // Its other end stays for the output; this is what a user types.
                            let _ = process.input.take(&[4]);
                        }
                        process.input.pass_on();
                    }
                    Stream::Output => process.outputs[0].fd = None,
                    Stream::Error => process.outputs[1].fd = None,
                }
            }
            Message::Credit {
                process,
                stream,
                bytes,
            } => {
                if let Some(process) = self.find(process) {
                    return process.outputs[stream.output_index()?].credit.grant(bytes);
                }
            }
            Message::Signal { process, number } => {
                let process = self.find(process).filter(|it| it.status.is_none());
                if let Some(process) = process.filter(|it| it.pid > 0) {
                    let _ = sys::kill(process.pid, number);
                }
            }
            Message::Size {
                process,
                rows,
                columns,
            } => {
                let process = self.find(process).filter(|it| it.is_terminal);
                if let Some(fd) = process.and_then(|it| it.outputs[0].fd.as_ref()) {
                    sys::set_size(fd, rows, columns);
                }
            }
            _ => return Err(Malformed::Kind(message.kind())),
        }
        Ok(())
    }

    /// Children have ended: those that were asked for, and those that were left to the first process.
    pub fn reap(&mut self) {
        while let Some((pid, status)) = sys::wait(false) {
            let found = self.places.iter_mut().flatten().find(|it| it.pid == pid);
            let Some(process) = found else { continue };
            process.status = Some(match status & 0x7f {
                0 => Status::Exited((status >> 8) as u8),
                signal => Status::Killed(signal as u8),
            });
            let is_terminal = process.is_terminal;
            process
                .outputs
                .iter_mut()
                .for_each(|it| it.process_ended(is_terminal));
        }
    }

    /// Reads outputs into `frame`. For those of ended processes too, which may have nothing more.
    pub fn take_outputs(&mut self, frame: &mut Frame, is_ready: impl Fn(i32) -> bool) {
        for process in self.places.iter_mut().flatten() {
            let id = process.id;
            for (output, stream) in process.outputs.iter_mut().zip(Stream::OUTPUTS) {
                let number = output.fd.as_ref().map(Fd::number);
                if output.rest.is_some() || number.is_some_and(&is_ready) {
                    output.take(id, stream, frame);
                }
            }
        }
    }

    /// Passes on held inputs.
    pub fn pass_on_inputs(&mut self) {
        for process in self.places.iter_mut().flatten() {
            if process.input.is_holding() {
                process.input.pass_on();
            }
        }
    }

    /// Adds what is to be said to `frame`; how the command ended, if `command` did, which is not said here.
    pub fn report(&mut self, frame: &mut Frame, command: u32) -> Option<Status> {
        for place in &mut self.places {
            let Some(process) = place else { continue };
            if process.id == command && process.status.is_some() {
                if process.outputs.iter().all(|output| output.fd.is_none()) {
                    return process.status;
                }
                continue;
            }
            if process.report(frame) {
                *place = None;
            }
        }
        None
    }

    /// Whether outputs of ended processes could be read now.
    pub fn has_rest(&self) -> bool {
        let processes = self.places.iter().flatten();
        processes
            .flat_map(|it| &it.outputs)
            .any(|it| it.rest.is_some() && it.wanted() > 0)
    }

    /// What to wait for; how many that are. Outputs only if they could be sent.
    pub fn interests(&self, polled: &mut [Poll], can_send: bool) -> usize {
        let mut count = 0;
        let mut add = |fd: &Option<Fd>, events| {
            if let (Some(fd), Some(place)) = (fd, polled.get_mut(count)) {
                *place = Poll {
                    fd: fd.number(),
                    events,
                    revents: 0,
                };
                count += 1;
            }
        };
        for process in self.places.iter().flatten() {
            if process.input.is_holding() {
                add(&process.input.fd, POLL_OUT);
            }
            for output in &process.outputs {
                if can_send && output.wanted() > 0 {
                    add(&output.fd, POLL_IN);
                }
            }
        }
        count
    }
}
