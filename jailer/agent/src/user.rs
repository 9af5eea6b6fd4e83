//! Users and groups of the guest's, by their names in its /etc/passwd and /etc/group.

use core::ffi::CStr;

use crate::sys;
use crate::text::Text;

/// Further groups that are taken.
const GROUPS_MAX: usize = 64;
/// Longer lines are passed over.
const LINE_MAX: usize = 4096;
/// So much of a file is looked at: an image can have a device without an end in its place.
const FILE_MAX: usize = 4 << 20;

pub struct User {
    pub id: u32,
    pub group: u32,
    groups: [u32; GROUPS_MAX],
    count: usize,
    home: [u8; 128],
    home_length: usize,
}

impl User {
    pub fn groups(&self) -> &[u32] {
        &self.groups[..self.count]
    }

    pub fn home(&self) -> &[u8] {
        &self.home[..self.home_length]
    }

    /// Adds a further group, if there is room.
    pub fn add_group(&mut self, group: u32) {
        if let Some(place) = self.groups.get_mut(self.count) {
            *place = group;
            self.count += 1;
        }
    }

    fn set_home(&mut self, home: &[u8]) {
        if let Some(place) = self.home.get_mut(..home.len()).filter(|_| !home.is_empty()) {
            place.copy_from_slice(home);
            self.home_length = home.len();
        }
    }
}

/// The user of `USER` or `USER:GROUP`, each a name or a number; root of an empty text.
pub fn find(text: &[u8]) -> Result<User, Text> {
    let mut parts = text.splitn(2, |byte| *byte == b':');
    let name = parts.next().unwrap_or_default();
    let group = parts.next();
    let mut user = User {
        id: 0,
        group: 0,
        groups: [0; GROUPS_MAX],
        count: 0,
        home: [0; 128],
        home_length: 0,
    };
    user.set_home(b"/");
    let wanted = if name.is_empty() { b"0" } else { name };
    let by_number = number(wanted);
    let mut login = [0; 64];
    let mut login_length = 0;
    let mut is_found = false;
    each_line(c"/etc/passwd", |line| {
        let mut fields = line.split(|byte| *byte == b':');
        let entry = fields.next().unwrap_or_default();
        let id = fields.nth(1).and_then(number);
        let own_group = fields.next().and_then(number);
        let home = fields.nth(1).unwrap_or_default();
        let is_this = match by_number {
            Some(_) => id == by_number,
            None => entry == wanted,
        };
        if let (true, Some(id), Some(own_group)) = (is_this, id, own_group) {
            (user.id, user.group) = (id, own_group);
            user.set_home(home);
            if let Some(place) = login.get_mut(..entry.len()) {
                place.copy_from_slice(entry);
                login_length = entry.len();
            }
            is_found = true;
        }
        is_found
    });
    if !is_found {
        user.id = by_number.ok_or_else(|| unknown(b"user", name))?;
    }
    if let Some(group) = group {
        user.group = group_number(group)?;
        return Ok(user);
    }
    let login = &login[..login_length];
    if login_length > 0 && user.id != 0 {
        each_line(c"/etc/group", |line| {
            let mut fields = line.split(|byte| *byte == b':');
            let id = fields.nth(2).and_then(number);
            let members = fields.next().unwrap_or_default();
            let is_member = members.split(|byte| *byte == b',').any(|it| it == login);
            if let (true, Some(id), Some(place)) = (is_member, id, user.groups.get_mut(user.count))
            {
                *place = id;
                user.count += 1;
            }
            false
        });
    }
    Ok(user)
}

fn group_number(name: &[u8]) -> Result<u32, Text> {
    let mut found = number(name);
    if found.is_none() {
        each_line(c"/etc/group", |line| {
            let mut fields = line.split(|byte| *byte == b':');
            if fields.next() == Some(name) {
                found = fields.nth(1).and_then(number);
            }
            found.is_some()
        });
    }
    found.ok_or_else(|| unknown(b"group", name))
}

fn unknown(what: &[u8], name: &[u8]) -> Text {
    let mut text = Text::new();
    text.add(b"cannot find the ").add(what).add(b" ");
    text.add(&name[..name.len().min(64)]).add(b" in the image");
    text
}

fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() {
        return None;
    }
    let value = text.iter().try_fold(0_u32, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 10)?;
        value.checked_mul(10)?.checked_add(u32::from(digit))
    });
    // To the kernel the highest means "leave as it is".
    value.filter(|value| *value != u32::MAX)
}

/// Shows each line of a file to `look`, until that is content.
fn each_line(path: &CStr, mut look: impl FnMut(&[u8]) -> bool) {
    let Ok(file) = sys::open(path, sys::READ | sys::NONBLOCK, 0) else {
        return;
    };
    let mut buffer = [0; LINE_MAX];
    let mut used = 0;
    let mut left = FILE_MAX;
    let mut is_too_long = false;
    while left > 0
        && let Ok(count @ 1..) = sys::read(&file, &mut buffer[used..])
    {
        used += count;
        left = left.saturating_sub(count);
        let mut start = 0;
        while let Some(length) = buffer[start..used].iter().position(|byte| *byte == b'\n') {
            let is_whole = !core::mem::take(&mut is_too_long);
            if is_whole && look(&buffer[start..start + length]) {
                return;
            }
            start += length + 1;
        }
        buffer.copy_within(start..used, 0);
        used -= start;
        if used == buffer.len() {
            (used, is_too_long) = (0, true);
        }
    }
    if used > 0 && !is_too_long {
        look(&buffer[..used]);
    }
}
