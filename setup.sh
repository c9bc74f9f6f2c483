#!/bin/sh
# Installs what building and testing needs and this Debian machine lacks, by package name:
# Rust, a C compiler for the emulator of the AMX lab, the tools that unpack it, and a decoder of CPUID.
# Does nothing, and needs no root, where all is there.
set -eu

packages=
need() {
    command -v "$1" >/dev/null 2>&1 || packages="$packages $2"
}
need git git
need gcc gcc
need g++ g++
need make make
need objcopy binutils
need perl perl
need xz xz-utils
need dpkg-deb dpkg
# What writes core dumps in a test of amxctl.
need gdb gdb
need cargo rustup
# A test prepares the lab from nothing: what was compiled once is not compiled again.
need ccache ccache
# The independent decoder that the fixtures are checked against.
need cpuid cpuid
[ -e /usr/include/stdlib.h ] || packages="$packages libc6-dev"
[ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || packages="$packages debian-archive-keyring"

if [ -n "$packages" ]; then
    echo "setup: installing$packages" >&2
    as_root=
    [ "$(id -u)" -eq 0 ] || as_root=sudo
    retries="-o Acquire::Retries=5"
    # The packages are words.
    # shellcheck disable=SC2086
    {
        $as_root apt-get $retries update -qq
        $as_root env DEBIAN_FRONTEND=noninteractive apt-get $retries install -y -qq --no-install-recommends $packages >&2
    }
fi

if ! cargo --version >/dev/null 2>&1; then
    echo "setup: rustup fetches the stable toolchain" >&2
    rustup default stable
fi

if [ -e /dev/kvm ] && [ ! -w /dev/kvm ]; then
    echo "setup: /dev/kvm is there but not yours to use: add yourself to its group (usermod -aG kvm \$USER, then log in again)" >&2
fi
