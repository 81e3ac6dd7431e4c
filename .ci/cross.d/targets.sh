# What each target is, and how far it can be taken on a Linux machine of the x64 kind.
# linux-x64-gnu is what npm test builds and tests.

targets=(linux-s390x-gnu linux-x64-musl linux-arm64-gnu linux-arm64-musl win32-x64-gnu
  darwin-x64 darwin-arm64 win32-x64-msvc win32-arm64-msvc)

# Sets for a target:
#   triple    Rust's name          links   whether it can be linked       about   one line
#   suffix    what cargo-zigbuild adds to the triple: the oldest C library
#   cpu, os, libc                  npm's names, for the packages that vitest needs
#   runs      how its programs run: qemu-CPU, musl, wine, or nothing
describe() {
  suffix="" links=true runs="" os=linux libc=glibc
  case $1 in
    linux-s390x-gnu)
      triple=s390x-unknown-linux-gnu cpu=s390x runs=qemu-s390x
      about="not shipped: a test of byte order, under QEMU's user mode"
      ;;
    linux-x64-musl)
      triple=x86_64-unknown-linux-musl cpu=x64 libc=musl runs=musl
      about="runs as it is, with a loader and a Node of its own"
      ;;
    linux-arm64-gnu)
      triple=aarch64-unknown-linux-gnu cpu=arm64 runs=qemu-aarch64 suffix=.2.17
      about="under QEMU's user mode"
      ;;
    linux-arm64-musl)
      triple=aarch64-unknown-linux-musl cpu=arm64 libc=musl runs=qemu-aarch64
      about="under QEMU's user mode"
      ;;
    win32-x64-gnu)
      triple=x86_64-pc-windows-gnu cpu=x64 os=win32 libc="" runs=wine
      about="not shipped: the code of Windows under wine, not the ABI"
      ;;
    darwin-x64)
      triple=x86_64-apple-darwin cpu=x64 os=darwin libc=""
      about="linked by zig; nothing here runs it"
      ;;
    darwin-arm64)
      triple=aarch64-apple-darwin cpu=arm64 os=darwin libc=""
      about="linked by zig; nothing here runs it"
      ;;
    win32-x64-msvc)
      triple=x86_64-pc-windows-msvc cpu=x64 os=win32 libc="" links=false
      about="checked: Microsoft's libraries, which it is linked with, are in no registry"
      ;;
    win32-arm64-msvc)
      triple=aarch64-pc-windows-msvc cpu=arm64 os=win32 libc="" links=false
      about="checked: Microsoft's libraries, which it is linked with, are in no registry"
      ;;
    *)
      echo "no target ${1:-is named}: .ci/cross list" >&2
      return 1
      ;;
  esac
  work=$cross/$1
  # The name by which the library looks for it.
  addon_name=qcow2.${1/win32-x64-gnu/win32-x64-msvc}.node
}
