// The programs that the suite calls: ours under QEMU's names, or QEMU's own, and stubs of those that no test here needs.
import { spawnSync } from 'node:child_process'
import { chmodSync, mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..')

/** What a machine without QEMU's emulator answers when the suite asks what there is. */
const EMULATOR = `#!/bin/sh
case "$*" in
  *"-machine help"*) echo "none  empty machine" ;;
  *"-drive format=help"*)
    echo "Supported formats: bochs cloop file host_device luks nbd parallels qcow qcow2 qed raw vdi vhdx vmdk vpc"
    echo "Supported formats (read-only): bochs cloop" ;;
  *"-device help"*) echo 'name "virtio-blk", bus virtio-bus' ;;
  *--version*) echo "QEMU emulator version 10.0.2" ;;
  *) exit 1 ;;
esac
`

const find = program => {
  const found = spawnSync('sh', ['-c', 'command -v "$1"', 'sh', program], { encoding: 'utf8' })
  if (found.status !== 0) throw new Error(`${program} is not installed`)
  return found.stdout.trim()
}

/** Programs of the command line's that stand under QEMU's name. */
const OURS = ['qemu-img', 'qemu-io', 'qemu-nbd']

/** Makes the programs in `folder`; `sides` says whose each is, `ours` or `qemu`. Returns the environment that names them. */
export function makeTools(folder, sides) {
  mkdirSync(folder, { recursive: true })
  const script = (name, text) => {
    const path = join(folder, name)
    writeFileSync(path, text)
    chmodSync(path, 0o755)
    return path
  }
  const tool = name => {
    if (sides[name] !== 'ours' || !OURS.includes(name)) return script(name, `#!/bin/sh\nexec "${find(name)}" "$@"\n`)
    // The command line speaks as what it is called by. Tests signal the process by its number, which is the shell's own.
    mkdirSync(join(folder, 'ours'), { recursive: true })
    symlinkSync(join(root, 'dist', 'cli.js'), join(folder, 'ours', name))
    return script(name, `#!/bin/sh\nexec "${process.execPath}" "${join(folder, 'ours', name)}" "$@"\n`)
  }
  return {
    QEMU_IMG_PROG: tool('qemu-img'),
    QEMU_IO_PROG: tool('qemu-io'),
    QEMU_NBD_PROG: tool('qemu-nbd'),
    QEMU_PROG: script('qemu-system', EMULATOR),
    QSD_PROG: script('qemu-storage-daemon', '#!/bin/sh\nexit 1\n'),
  }
}
