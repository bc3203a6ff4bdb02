#!/bin/sh
# Runs the container tests as PID 1 of a virtual machine, with those of cgroup v2, which need a machine of their own.
# Needs a Linux kernel image (any distribution's), qemu-system-x86_64 and busybox-static. Prints the guest's console; ends with
# 0 if every test passed.
#
#     crates/executor/tests/in-vm.sh /boot/vmlinuz-6.1.0-50-cloud-amd64
set -eu
kernel=${1:?usage: in-vm.sh KERNEL}
target=x86_64-unknown-linux-gnu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

test=$(RUSTFLAGS="-C target-feature=+crt-static" cargo test --package bulkhead-executor --target $target --test containers \
    --no-run --message-format json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)
mkdir -p "$work/root/bin" "$work/root/dev"
cp "$test" "$work/root/init"
strip "$work/root/init"
cp /bin/busybox "$work/root/bin/busybox"
mknod "$work/root/dev/console" c 5 1
(cd "$work/root" && find . | busybox cpio -o -H newc) > "$work/initramfs" 2> /dev/null

accel=tcg
if [ "${ACCEL:-}" ]; then accel=$ACCEL; fi
timeout "${TIMEOUT:-600}" qemu-system-x86_64 -M q35 -accel "$accel" -smp 2 -m 1024 -nographic -nodefaults -serial stdio -no-reboot \
    -kernel "$kernel" -initrd "$work/initramfs" -append "console=ttyS0 panic=-1 quiet swapaccount=1" < /dev/null | tee "$work/console"
grep -q "^test result: ok" "$work/console"
