//! `make bench-boot`: a bootimage becomes its node image, by the steps of the installer's scripts and by this agent, in a
//! container and in a virtual machine. `docs/benchmarks.md` describes what is measured.

mod incumbent;
mod memory;
mod picture;
mod sample;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use testbed::container::{self, Container, Network};
use testbed::guest::Guest;
use testbed::images::{Images, oracle, project, work_dir};
use testbed::registry::Registry;
use testbed::scenario::node_files;
use testbed::vm::{self, HOST, Vm};

use memory::{Group, sampled, sampler};
use sample::{Sample, table};

/// Programs that replace `/usr`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The steps of the installer's scripts.
    Incumbent,
    /// This agent.
    Agent,
}

impl Side {
    /// Name in tables and of its guest's folder.
    pub fn word(self) -> &'static str {
        match self {
            Self::Incumbent => "incumbent",
            Self::Agent => "agent",
        }
    }

    /// Unit that starts the pull.
    pub fn pull_unit(self) -> &'static str {
        match self {
            Self::Incumbent => incumbent::PULL,
            Self::Agent => "node-image-pull.service",
        }
    }

    fn kargs(self) -> &'static [&'static str] {
        if self == Self::Incumbent { &incumbent::KARGS } else { &[] }
    }
}

/// Machine that boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Machine {
    Container,
    Vm,
}

impl Machine {
    fn word(self) -> &'static str {
        match self {
            Self::Container => "container",
            Self::Vm => "vm",
        }
    }

    /// Time limit of a pull, and the pause between two questions.
    fn patience(self) -> (Duration, Duration) {
        match self {
            Self::Container => (Duration::from_secs(300), Duration::from_millis(200)),
            Self::Vm => (Duration::from_secs(1800), Duration::from_secs(5)),
        }
    }
}

struct Bench {
    images: &'static Images,
    image: String,
    oracle: PathBuf,
}

fn main() -> Result<()> {
    let chosen = |name: &str, default: &str| {
        std::env::var(name).ok().filter(|value| !value.is_empty()).unwrap_or(default.into())
    };
    let (image, only) = (chosen("BENCH_IMAGE", "node-b"), chosen("BENCH_MACHINE", ""));
    let bench = Bench { images: Images::ensure()?, image, oracle: oracle()? };
    let mut text = format!("Live bootimage (Debian 12) that becomes {}.\n", bench.image);
    let machines = [Machine::Container, Machine::Vm].into_iter().filter(|one| only.is_empty() || only == one.word());
    for machine in machines {
        let [incumbent, agent] = [Side::Incumbent, Side::Agent].map(|side| bench.run(machine, side));
        let (incumbent, agent) = (incumbent?, agent?);
        text.push_str(&format!("\n### {}\n\n{}", machine.word(), table(&incumbent, &agent)));
        let path = project().join(format!("target/bench-boot-{}.svg", machine.word()));
        fs::write(&path, picture::draw(&[&incumbent, &agent]))
            .with_context(|| format!("writing {}", path.display()))?;
        eprintln!("bench-boot: {}", path.display());
    }
    ensure!(text.contains("###"), "BENCH_MACHINE is {only:?}: expected container or vm");
    fs::write(project().join("target/bench-boot.md"), &text)?;
    println!("{text}");
    Ok(())
}

impl Bench {
    fn run(&self, machine: Machine, side: Side) -> Result<Sample> {
        eprintln!("bench-boot: {} in a {}", side.word(), machine.word());
        let sample = match machine {
            Machine::Container => self.in_container(side),
            Machine::Vm => self.in_vm(side),
        };
        let sample = sample.with_context(|| format!("{} in a {}", side.word(), machine.word()))?;
        eprintln!("bench-boot:   {:.1} s", sample.wall());
        Ok(sample)
    }

    fn in_container(&self, side: Side) -> Result<Sample> {
        let name = format!("bench-boot-{}", side.word());
        let network = Network::new()?;
        let work = work_dir(&format!("{name}-registry"))?;
        let registry = Registry::start(&self.images.storage, &work, Some(network.pid()), None)?;
        let setup = container::Setup { kargs: side.kargs(), ..container::Setup::live(&name, &self.images.boot) };
        let group = Group::enter()?;
        let guest = Container::start(self.images, &network, &setup, |files| {
            self.fill(files, side, "127.0.0.1", registry.port)
        })?;
        group.leave()?;
        let finished = sample::wait(&guest, Machine::Container.patience());
        finished.with_context(|| {
            guest
                .run("systemctl list-jobs; systemctl --failed; journalctl -n 60")
                .map_or_else(|e| e.to_string(), |a| a.text)
        })?;
        std::thread::sleep(Duration::from_secs(2));
        Sample::take(&guest, side, group.samples())
    }

    fn in_vm(&self, side: Side) -> Result<Sample> {
        let name = format!("bench-boot-vm-{}", side.word());
        let work = work_dir(&format!("{name}-registry"))?;
        let registry = Registry::start(&self.images.storage, &work, None, None)?;
        let setup = vm::Setup {
            kargs: side.kargs(),
            memory_mib: 4096,
            limit: Duration::from_secs(2400),
            ..vm::Setup::live(&name, &self.images.boot)
        };
        let guest = Vm::start(self.images, &setup, |files| {
            self.fill(files, side, HOST, registry.port)?;
            sampler(files)
        })?;
        guest.wait_ssh(Duration::from_secs(900))?;
        sample::wait(&guest, Machine::Vm.patience())?;
        std::thread::sleep(Duration::from_secs(10));
        let samples = sampled(&guest)?;
        Sample::take(&guest, side, samples)
    }

    fn fill(&self, files: &testbed::files::Files, side: Side, host: &str, port: u16) -> Result<()> {
        let image = self.images.image(&self.image)?.by_digest();
        node_files(files, &image, host, port)?;
        match side {
            Side::Agent => Ok(()),
            Side::Incumbent => incumbent::files(files, &image, &self.oracle),
        }
    }
}
