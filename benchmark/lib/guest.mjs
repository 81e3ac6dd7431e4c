// A guest that installs Debian: its kernel, its first programs, and the disk that it installs from. Made from Debian's own packages when it is asked
// for, kept in the cache.

import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { homedir } from 'node:os'
import { join } from 'node:path'
import { onPath } from '../../.ci/lib.mjs'

const CACHE = process.env.QCOW2_CACHE ?? join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'qcow2-ci')
const RELEASE = 'bookworm'
const MODULES = ['virtio_pci', 'virtio_blk', 'ext4']
const NEEDED = [
  'qemu-system-x86_64',
  'debootstrap',
  'busybox',
  'apt-get',
  'dpkg-deb',
  'depmod',
  'mke2fs',
  'cpio',
  'gzip',
]

/** What the guest says on its console when the installation begins, and when all of it is durable. */
export const BEGIN = 'qcow2-guest: begin'
export const END = 'qcow2-guest: end'

/** The first program: a file system on the empty disk, the base system unpacked onto it, every package unpacked and configured by dpkg. */
const INIT = `#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /source /target
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
for module in ${MODULES.join(' ')}; do /bin/busybox modprobe $module; done
/bin/busybox mount -t ext4 -o ro /dev/vdb /source
/bin/busybox mount --bind /dev /source/dev
echo '${BEGIN}'
/bin/busybox chroot /source /sbin/mkfs.ext4 -q /dev/vda &&
  /bin/busybox mount -t ext4 /dev/vda /target &&
  /bin/busybox cp -a /source/. /target/ 2>/dev/null
/bin/busybox mount --bind /dev /target/dev
/bin/busybox mount -t proc none /target/proc
PATH=/usr/sbin:/usr/bin:/sbin:/bin /bin/busybox chroot /target /debootstrap/debootstrap --second-stage
state=$?
/bin/busybox umount /target/proc /target/dev
/bin/busybox umount /target
/bin/busybox sync
echo "${END} $state"
/bin/busybox poweroff -f
`

function must(program, args, options = {}) {
  const { status, stdout, stderr, error } = spawnSync(program, args, {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
    ...options,
  })
  if (status !== 0)
    throw new Error(`${program} ${args.join(' ')}: ${error?.message ?? `${status}\n${stdout}${stderr}`}`)
  return stdout
}

/** Why no guest can be started here; `undefined` where one can. */
export function missing() {
  const absent = NEEDED.filter(program => !onPath(program))
  if (absent.length > 0) return `not installed: ${absent.join(', ')}`
  return process.getuid?.() === 0 ? undefined : 'debootstrap needs root'
}

/** `{ kernel, initramfs, source }`: paths of what is made of `folder`, a new one. */
function make(folder) {
  // The kernel that the cloud's machines have: small, and what it needs is in few modules.
  const depends = must('apt-cache', ['depends', 'linux-image-cloud-amd64'])
  const name = /Depends: (linux-image-\S+)/.exec(depends)?.[1]
  if (name === undefined) throw new Error('Debian has no kernel for clouds here: linux-image-cloud-amd64')
  must('apt-get', ['download', '-q', name], { cwd: folder })
  must('dpkg-deb', ['-x', readdirSync(folder).find(file => file.endsWith('.deb')), 'kernel'], { cwd: folder })
  const version = name.replace('linux-image-', '')
  must('depmod', ['-b', join(folder, 'kernel'), version])

  const first = join(folder, 'first')
  const modules = join('lib', 'modules', version)
  mkdirSync(join(first, 'bin'), { recursive: true })
  mkdirSync(join(first, modules), { recursive: true })
  must('cp', ['/bin/busybox', join(first, 'bin')])
  must('cp', ['-a', `${join(folder, 'kernel', modules)}/.`, join(first, modules)])
  // Drivers for hardware that the guest has not: they are most of it.
  for (const other of ['net', 'sound', 'drivers/net', 'drivers/gpu', 'drivers/infiniband']) {
    rmSync(join(first, modules, 'kernel', other), { recursive: true, force: true })
  }
  writeFileSync(join(first, 'init'), INIT, { mode: 0o755 })
  must('sh', ['-c', `cd '${first}' && find . | cpio -o -H newc --quiet | gzip -1 > ../initramfs`])

  must('debootstrap', ['--foreign', '--variant=minbase', RELEASE, join(folder, 'base')])
  must('mke2fs', ['-q', '-t', 'ext4', '-d', join(folder, 'base'), join(folder, 'source.img'), '600M'])
  renameSync(join(folder, 'kernel', 'boot', `vmlinuz-${version}`), join(folder, 'vmlinuz'))
  for (const part of ['kernel', 'first', 'base']) rmSync(join(folder, part), { recursive: true, force: true })
}

/** The parts of a guest, made on first use. Takes a minute, and the network. */
export function guest() {
  const folder = join(CACHE, 'guest', RELEASE)
  if (!existsSync(folder)) {
    mkdirSync(join(CACHE, 'guest'), { recursive: true })
    const fresh = mkdtempSync(`${folder}-`)
    try {
      make(fresh)
      renameSync(fresh, folder)
    } finally {
      rmSync(fresh, { recursive: true, force: true })
    }
  }
  return { kernel: join(folder, 'vmlinuz'), initramfs: join(folder, 'initramfs'), source: join(folder, 'source.img') }
}
