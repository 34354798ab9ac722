//! Reads the machine that a program is built for from its ELF header.
//!
//! Format: the ELF header of the System V ABI: `e_ident` (class at byte 4, data encoding at 5), `e_machine`
//! at byte 18 in that encoding.

use std::fmt;

/// The fields of an ELF header that must be equal for a program to run natively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// 1: 32 bits, 2: 64 bits.
    class: u8,
    /// 1: little endian, 2: big endian.
    data: u8,
    /// `EM_*`.
    machine: u16,
}

impl Machine {
    /// Returns the machine that this program was built for.
    ///
    /// # Errors
    /// The program's own file cannot be read.
    pub fn here() -> std::io::Result<Self> {
        use std::io::Read;
        let mut start = [0; 20];
        std::fs::File::open("/proc/self/exe")?.read_exact(&mut start)?;
        machine_of(&start).ok_or_else(|| std::io::Error::other("this program is not an ELF file"))
    }
}

impl fmt::Display for Machine {
    /// Writes the name that uname(1) prints, or the numbers of an unknown machine.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match (self.machine, self.class, self.data) {
            (62, 2, 1) => "x86_64",
            (3, 1, 1) => "i686",
            (183, 2, 1) => "aarch64",
            (40, 1, 1) => "arm",
            (21, 2, 1) => "ppc64le",
            (22, 2, 2) => "s390x",
            (243, 2, 1) => "riscv64",
            (258, 2, 1) => "loongarch64",
            (machine, class, data) => {
                return write!(out, "ELF machine {machine} (class {class}, data encoding {data})");
            }
        };
        out.write_str(word)
    }
}

/// Returns the machine of a program that begins with these bytes, or `None` if they are not an ELF header.
pub fn machine_of(start: &[u8]) -> Option<Machine> {
    let header: &[u8; 20] = start.first_chunk()?;
    if !header.starts_with(b"\x7fELF") {
        return None;
    }
    let (class, data, word) = (header[4], header[5], [header[18], header[19]]);
    let machine = if data == 2 { u16::from_be_bytes(word) } else { u16::from_le_bytes(word) };
    Some(Machine { class, data, machine })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn header(class: u8, data: u8, machine: [u8; 2]) -> Vec<u8> {
        let mut header = b"\x7fELF".to_vec();
        header.extend([class, data, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0]);
        header.extend(machine);
        header
    }

    #[test]
    fn the_machine_is_read_from_the_header() {
        let word = |class, data, machine| machine_of(&header(class, data, machine)).unwrap().to_string();
        assert_eq!(word(2, 1, [62, 0]), "x86_64");
        assert_eq!(word(2, 1, [183, 0]), "aarch64");
        assert_eq!(word(2, 2, [0, 22]), "s390x", "big endian");
        assert!(word(2, 1, [9, 9]).contains("machine 2313"));
        assert_eq!(machine_of(b"#!/bin/sh\nexec true, and more"), None);
        assert_eq!(machine_of(b"\x7fELF"), None, "too short");
        assert_ne!(machine_of(&header(1, 1, [62, 0])), machine_of(&header(2, 1, [62, 0])), "x32");
        let here = Machine::here().unwrap();
        assert_eq!(here.to_string(), rustix::system::uname().machine().to_str().unwrap());
    }
}
