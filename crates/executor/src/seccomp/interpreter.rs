//! Runs a seccomp program as the kernel would, for tests.

/// The verdict on one system call. Panics on what the kernel's verifier would refuse.
pub(super) fn run(program: &[u64], arch: u32, nr: u32, args: [u64; 6]) -> u32 {
    let mut data = [0u8; 64];
    data[..4].copy_from_slice(&nr.to_le_bytes());
    data[4..8].copy_from_slice(&arch.to_le_bytes());
    for (i, arg) in args.iter().enumerate() {
        data[16 + 8 * i..24 + 8 * i].copy_from_slice(&arg.to_le_bytes());
    }
    let (mut pc, mut accumulator) = (0usize, 0u32);
    loop {
        let raw = program[pc];
        let [code, _, jt, jf, k @ ..] = raw.to_le_bytes();
        let k = u32::from_le_bytes(k);
        pc += 1;
        let mut branch = |taken: bool| pc += usize::from(if taken { jt } else { jf });
        match code {
            0x20 => {
                let at = k as usize;
                assert_eq!(at % 4, 0);
                accumulator = u32::from_le_bytes(std::array::from_fn(|byte| data[at + byte]));
            }
            0x54 => accumulator &= k,
            0x05 => pc += k as usize,
            0x15 => branch(accumulator == k),
            0x25 => branch(accumulator > k),
            0x35 => branch(accumulator >= k),
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
}
