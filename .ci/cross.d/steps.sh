# What is done with a target, in order. Each step fills a column of the table; a step that cannot be done says why.

# The crates whose Rust tests run: bytes, codecs, and storages. What the engine does with them shows the suite of vitest.
rust_tests=(-p qcow2-format -p qcow2-transform -p qcow2-core)
# Reading, writing, snapshots, chains, other formats; convert and check are in all of them, and qemu-img looks at what is written.
vitest_tests=(api/read.test api/backing.test write/write.test write/lifecycle.test manage/snapshots.test formats/vmdk.test)
vitest_wine=(api/read.test api/stream.test write/write.test manage/resize.test manage/compact.test formats/vdi.test formats/parallels.test)
vitest_sample=(api/read.test)

# What the one who runs the tests has not. QEMU's user mode says of every file that it has no direct I/O, and takes minutes for a thousand
# snapshots; on Windows no descriptor is taken from Node, and wine has no direct I/O, and other errors for folders.
left_out() {
  case $runs in
    qemu-*) echo 'detectZeroes":"unmap|cache modes|host calls|thousand' ;;
    wine) echo 'FileHandle|a directory and a missing|cache modes' ;;
  esac
}
rust_left_out() {
  case $runs in
    qemu-*) echo "--skip platform::alignment" ;;
  esac
}

environment() {
  local upper
  upper=$(tr 'a-z-' 'A-Z_' <<<"$triple")
  echo "export CARGO_INCREMENTAL=0 CARGO_TARGET_DIR=$cross/target CARGO_ZIGBUILD_ZIG_PATH=$zig/ziglang/zig"
  echo "export PATH=$zig/bin:\$PATH"
  # Our own crates, which a sample compiles anew each time, compile in half the time.
  ! $sample || echo "export CARGO_PROFILE_DEV_OPT_LEVEL=0"
  # An addon is linked with the C library that Node is linked with.
  [ "$libc" != musl ] || echo "export CARGO_TARGET_${upper}_RUSTFLAGS='-C target-feature=-crt-static'"
  case $runs-$cpu-$libc in
    qemu-s390x-*) echo "export CARGO_TARGET_${upper}_RUNNER='qemu-s390x -L /usr/s390x-linux-gnu'" ;;
    qemu-aarch64-*-glibc) echo "export CARGO_TARGET_${upper}_RUNNER='qemu-aarch64 -L /usr/aarch64-linux-gnu'" ;;
    # zig links programs for musl with nothing but themselves.
    qemu-aarch64-*-musl) echo "export CARGO_TARGET_${upper}_RUNNER=qemu-aarch64" ;;
    wine-*)
      echo "export CARGO_TARGET_${upper}_LINKER=x86_64-w64-mingw32-gcc CARGO_TARGET_${upper}_RUNNER=wine"
      echo "export WINEPREFIX=$cross/wine WINEDEBUG=-all LIBNODE_PATH=$cross/libnode"
      ;;
  esac
  case $triple in
    *-msvc)
      local name=${triple//-/_}
      echo "export CC_$name=$here/.ci/cross.d/zig-cc AR_$name=$here/.ci/cross.d/zig-lib"
      ;;
  esac
}

# Cargo for the target, by zig where zig links. $1: build, check or test
cargo_for() {
  local command=$1
  shift
  (
    eval "$(environment)"
    case $triple in
      *-windows-*) timeout "$step_limit" cargo "$command" --target "$triple" "$@" ;;
      *) timeout "$step_limit" cargo-zigbuild "${command/build/zigbuild}" --target "$triple$suffix" "$@" ;;
    esac
  )
}

addon() {
  case $os in
    linux) echo "$cross/target/$triple/debug/libqcow2_node.so" ;;
    darwin) echo "$cross/target/$triple/debug/libqcow2_node.dylib" ;;
    win32) echo "$cross/target/$triple/debug/qcow2_node.dll" ;;
  esac
}

# A tree of the package's own for the target: what is built, its tests, and the packages of npm for that platform.
make_tree() {
  local tree=$work/tree flags=(--os="$os" --cpu="$cpu") hash
  mkdir -p "$tree" || return
  find "$tree" -mindepth 1 -maxdepth 1 ! -name node_modules ! -name .lock -exec rm -rf {} +
  cp -r package.json package-lock.json .npmrc tsconfig.json vitest.config.mts src __test__ dist .ci/cross.d/load.cjs "$tree/" || return
  rm -f "$tree"/dist/*.node
  hash=$(sha256sum <package-lock.json)
  if [ "$(cat "$tree/.lock" 2>/dev/null)" != "$hash" ]; then
    [ -z "$libc" ] || flags+=(--libc="$libc")
    (cd "$tree" && timeout 300 npm ci --ignore-scripts --no-audit --no-fund --loglevel=error "${flags[@]}") || return
    echo "$hash" >"$tree/.lock"
  fi
  cp "$(addon)" "$tree/dist/$addon_name"
}

load() {
  make_tree || return
  node_for load.cjs
}

# Runs one step unless the time is over; its last lines are shown where it fails. $1: column, $2: seconds at most
step() {
  local column=$1 begun=$SECONDS code
  step_limit=$2
  shift 2
  if [ "$SECONDS" -ge "$limit" ]; then
    results[$column]="no time"
    notes+="$name: $column was left out: $limit s are gone"$'\n'
    return 1
  fi
  echo "── $name: $column"
  "$@" 2>&1 | tee "$log" | grep -vE '^ +(Compiling|Checking|Downloaded|Fresh) |^ [✓↓] |^test .* ok$'
  code=${PIPESTATUS[0]}
  seconds[$column]=$((SECONDS - begun))
  if [ "$code" -eq 0 ]; then
    results[$column]=$(counted)
    return 0
  fi
  results[$column]="FAILED $(counted)"
  [ "$code" -ne 124 ] || notes+="$name: $column took over $step_limit s"$'\n'
  failed=1
  return 1
}

# What a runner counted in the log, or yes.
counted() {
  awk '
    /^test result:/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed;") p += $i; if ($(i + 1) == "failed;") f += $i } seen = 1 }
    /^ *Tests +/ { for (i = 1; i < NF; i++) { if ($(i + 1) == "passed") p += $i; if ($(i + 1) == "failed") f += $i } seen = 1 }
    END { if (!seen) print "yes"; else if (f) print p " of " p + f; else print p + 0 }' <(sed 's/\x1b\[[0-9;]*m//g' "$log")
}

run_target() {
  declare -A results=() seconds=()
  local begun=$SECONDS column jobs=(-j "${QCOW2_CROSS_JOBS:-2}")
  if step built 900 bring_tools; then
    if $links; then
      step built 1500 cargo_for build "${jobs[@]}" -p qcow2-node --lib && results[linked]=yes && run_tests
    else
      step built 1500 cargo_for check "${jobs[@]}" -p qcow2-node --lib
      results[linked]=no
      notes+="$name: $about"$'\n'
    fi
  else
    notes+="$name: its tools cannot be had: $(tail -n 1 "$log")"$'\n'
  fi
  for column in built linked loaded rust vitest; do : "${results[$column]:=-}"; done
  rows+=$(printf '%-18s %-9s %-9s %-9s %-16s %-16s %s' "$name" "${results[built]}" "${results[linked]}" "${results[loaded]}" \
    "${results[rust]}" "${results[vitest]}" $((SECONDS - begun)))$'\n'
}

run_tests() {
  if [ -z "$runs" ]; then
    notes+="$name: $about"$'\n'
    return
  fi
  step loaded 400 load
  if $sample; then
    step vitest 200 vitest "${vitest_sample[@]}"
  else
    # shellcheck disable=SC2046 # words
    step rust 1500 cargo_for test "${jobs[@]}" "${rust_tests[@]}" --no-fail-fast -- $(rust_left_out)
    if [ "$runs" = wine ]; then
      step vitest 1200 vitest "${vitest_wine[@]}"
    else
      step vitest 1200 vitest "${vitest_tests[@]}"
    fi
  fi
  [ -z "$(left_out)" ] || notes+="$name: left out of vitest, as $runs has it not: $(left_out)"$'\n'
}

vitest() {
  local pattern
  pattern=$(left_out)
  node_for node_modules/vitest/vitest.mjs run --reporter=verbose --no-color ${pattern:+-t "^(?!.*($pattern))"} "$@"
}

# The target's Node in its tree. That of Windows wants files: under wine it opens no pipe that two of its streams share.
node_for() {
  local code
  (cd "$work/tree" && timeout "$step_limit" "$work/node" "$@" </dev/null >"$work/stdout" 2>"$work/stderr")
  code=$?
  cat "$work/stdout" "$work/stderr"
  return $code
}
