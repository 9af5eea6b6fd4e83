//! What `tools/soak` runs.

use std::fs;
use std::process::ExitCode;

use mayfly_measure::failure::{Context, Failure, Result};
use mayfly_measure::host::Host;
use mayfly_measure::jail;
use mayfly_measure::soak::args::{self, Args, USAGE};
use mayfly_measure::soak::record::Record;
use mayfly_measure::soak::{self, plot};
use serde_json::json;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mayfly-soak: {error}.");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let Some(args) = args::parse(std::env::args().skip(1))? else {
        print!("{USAGE}");
        return Ok(());
    };
    if !jail::permitted() {
        return Err(Failure::new(
            "jails, taps and control groups are made by root only: run it as root",
        ));
    }
    let host = Host::read();
    let record = soak::run(&args)?;
    print!("{}{}", host.text(), record.text());
    write(&args, &host, &record)?;
    match record.findings().len() {
        0 => Ok(()),
        count => Err(Failure::new(format!("{count} findings: see above"))),
    }
}

fn write(args: &Args, host: &Host, record: &Record) -> Result<()> {
    let commit = args.commit.as_deref().unwrap_or("unknown");
    if let Some(path) = &args.json {
        let mut all = record.json();
        all["host"] = host.json();
        all["date"] = json!(host.date());
        all["commit"] = json!(commit);
        fs::write(path, format!("{all:#}\n")).cannot(|| format!("write {}", path.display()))?;
    }
    if let Some(path) = &args.svg {
        let found = match record.findings().as_slice() {
            [] => "nothing grew, nothing was left behind".to_owned(),
            found => format!("FOUND: {}", found.join("; ")),
        };
        let heading = [
            format!(
                "{}; commit {commit}; {}; {found}",
                host.date(),
                record.line()
            ),
            host.line(),
        ];
        let text = plot::draw(record, &heading);
        fs::write(path, text).cannot(|| format!("write {}", path.display()))?;
    }
    Ok(())
}
