//! A container's control groups, whether this program makes them (`cgroup`) or systemd does (`scope`).

use std::path::Path;
use std::time::{Duration, Instant};

use oci_spec::runtime::LinuxResources;

use super::TIDY;
use crate::args::Global;
use crate::bundle::place::{FIELD, Place, Scope};
use crate::bundle::resources::{self, Setting};
use crate::bundle::{Container, FieldError, refuse, ungrouped};
use crate::cgroup::{self, Groups};
use crate::error::AnyError;
use crate::scope::{self, Unit};
use crate::state::{Held, Record};
use crate::user::User;

/// Makes sure that who makes them is who `linux.cgroupsPath` is written for.
pub fn check(container: &Container, global: &Global) -> Result<(), FieldError> {
    match &container.cgroup {
        Some(Place::Scope(scope)) if !global.has_systemd => refuse(
            FIELD,
            format!(
                "it asks systemd for {}; have the engine give --systemd-cgroup, or use cgroupfs",
                scope.unit
            ),
        ),
        Some(Place::Below(path)) if global.has_systemd => refuse(
            FIELD,
            format!(
                "\"{}\" is not SLICE:PREFIX:NAME, as --systemd-cgroup needs; give such a path, or leave \
                 --systemd-cgroup out",
                path.display()
            ),
        ),
        _ => Ok(()),
    }
}

/// Those of a container.
pub fn of(record: &Record) -> Result<Groups, AnyError> {
    Ok(Groups::made(&record.groups, &cgroup::hierarchies()?))
}

/// Writes down which are to be made, as far as that is known before. The jailer's words for limits, where there are
/// to be none.
pub fn plan(
    container: &mut Container,
    user: User,
    global: &Global,
    record: &mut Record,
) -> Result<Vec<String>, AnyError> {
    match &container.cgroup {
        Some(Place::Below(path)) => {
            let mut groups = Groups::at(path, &cgroup::hierarchies()?);
            leave_out_denied(&mut groups, user, &mut container.notes);
            write_down(&groups, record);
        }
        Some(Place::Scope(scope)) => {
            scope::check(user)?;
            record.scope = Some(scope.unit.clone());
        }
        None => {}
    }
    let has_any = !record.groups.is_empty() || record.scope.is_some();
    match has_any || global.has_no_groups {
        true => Ok(Vec::new()),
        false => Ok(ungrouped::limits(
            &container.resources,
            &mut container.notes,
        )?),
    }
}

/// What a user other than root can neither make nor use is not for its containers.
fn leave_out_denied(groups: &mut Groups, user: User, notes: &mut Vec<String>) {
    if !user.is_root() {
        groups.leave_out_denied(notes);
    }
}

fn write_down(groups: &Groups, record: &mut Record) {
    record.groups = groups.paths();
    record.above = groups.missing_above();
}

/// Makes them, with their limits, and moves this process in.
pub fn enter(
    container: &Container,
    user: User,
    held: &mut Held,
    notes: &mut Vec<String>,
) -> Result<(), AnyError> {
    let settings = resources::settings(&container.resources);
    let groups = match &container.cgroup {
        None => return Ok(()),
        // This user may make none of them.
        Some(Place::Below(_)) if held.record.groups.is_empty() => return Ok(()),
        Some(Place::Below(_)) => {
            let groups = of(&held.record)?;
            groups.make()?;
            held.record.has_groups = true;
            held.write()?;
            groups
        }
        Some(Place::Scope(scope)) => start(scope, user, &settings, held, notes)?,
    };
    groups.set(&settings, notes)?;
    Ok(groups.enter()?)
}

/// Has systemd make a scope.
fn start(
    scope: &Scope,
    user: User,
    settings: &[Setting],
    held: &mut Held,
    notes: &mut Vec<String>,
) -> Result<Groups, AnyError> {
    let hierarchies = cgroup::hierarchies()?;
    let files = Groups::at(Path::new(""), &hierarchies).files(settings);
    let has_v1 = hierarchies.iter().any(|one| !one.is_v2);
    let unit = Unit::of(&scope.unit, held.path(), user)?;
    let below = unit.start(scope, &files, has_v1)?;
    let mut groups = Groups::at(&below, &hierarchies);
    leave_out_denied(&mut groups, user, notes);
    write_down(&groups, &mut held.record);
    // The unit of that name is this container's.
    held.record.has_groups = true;
    held.write()?;
    groups.complete()?;
    Ok(groups)
}

/// Changes their limits.
pub fn set(
    user: User,
    held: &Held,
    changed: &LinuxResources,
    notes: &mut Vec<String>,
) -> Result<(), AnyError> {
    let settings = resources::settings(changed);
    let groups = of(&held.record)?;
    if let Some(unit) = unit(user, held)? {
        unit.update(&groups.files(&settings))?;
    }
    groups.set(&settings, notes)
}

fn unit(user: User, held: &Held) -> Result<Option<Unit>, AnyError> {
    let name = held.record.scope.as_ref();
    let unit = name
        .map(|name| Unit::of(name, held.path(), user))
        .transpose();
    Ok(unit?)
}

/// Ends what is left in them, and removes them.
pub fn remove(user: User, held: &Held) -> Result<(), AnyError> {
    let groups = of(&held.record)?;
    let unit = unit(user, held)?;
    let is_anothers = match &unit {
        Some(unit) => unit.is_anothers()?,
        None => false,
    };
    if !held.record.has_groups || is_anothers {
        if let Some(unit) = unit {
            unit.stop()?;
        }
        // Others' processes may be in them.
        groups.remove_empty(&held.record.above);
        return Ok(());
    }
    let until = Instant::now() + TIDY;
    while !groups.are_empty() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Some(unit) = unit {
        // systemd would ask them to end, and wait for a while.
        groups.kill();
        // An ordinary user's process cannot always leave a scope: it ends with this one then.
        if !groups.have_this_process() {
            unit.stop()?;
        }
    }
    groups.remove(&held.record.above)
}
