/** The `-o` options of each format: what QEMU knows, what it prints in the "Formatting" line, what the library gets. */

import { statfsSync } from 'node:fs'
import { CIPHER_ALGS, CIPHER_MODES, HASH_ALGS, IVGEN_ALGS } from '../cipher-names.js'
import {
  creationOf,
  formatOfWord,
  isKnown,
  isTarget,
  listed,
  SOURCE_FORMATS,
  TARGET_FORMATS,
} from '../formats/table.js'
import type { Encrypt, Format, TargetFormat } from '../index.js'
import type { AnyShape } from '../shape.js'
import { toName } from '../text.js'
import { CommandFailure, unsupported } from './failure.js'
import { imagePath } from './filename.js'
import { type OptionSpec, type OptionValue, type OptionValues, optionHelp } from './options.js'
import type { Objects } from './secrets.js'
import type { Session } from './session.js'
import { checkShape } from './shape-rules.js'
import { toSize } from './size.js'

/** In the order in which qemu-img prints them. */
const QCOW2_OPTIONS: readonly OptionSpec[] = [
  {
    name: 'encryption',
    type: 'bool',
    help: "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
  },
  { name: 'encrypt.format', type: 'string', help: "Encrypt the image, format choices: 'aes', 'luks'" },
  { name: 'encrypt.key-secret', type: 'string', help: 'ID of secret providing qcow AES key or LUKS passphrase' },
  { name: 'encrypt.cipher-alg', type: 'string', help: 'Name of encryption cipher algorithm' },
  { name: 'encrypt.cipher-mode', type: 'string', help: 'Name of encryption cipher mode' },
  { name: 'encrypt.ivgen-alg', type: 'string', help: 'Name of IV generator algorithm' },
  { name: 'encrypt.ivgen-hash-alg', type: 'string', help: 'Name of IV generator hash algorithm' },
  { name: 'encrypt.hash-alg', type: 'string', help: 'Name of encryption hash algorithm' },
  { name: 'encrypt.iter-time', type: 'number', help: 'Time to spend in PBKDF in milliseconds' },
  { name: 'encrypt.allow-weak', type: 'bool', help: "Take format 'aes', which is weak", own: true },
  { name: 'cluster_size', type: 'size', help: 'qcow2 cluster size', fallback: '65536' },
  { name: 'extended_l2', type: 'bool', help: 'Extended L2 tables', fallback: 'off' },
  {
    name: 'preallocation',
    type: 'string',
    help: 'Preallocation mode (allowed values: off, metadata, falloc, full)',
  },
  {
    name: 'compression_type',
    type: 'string',
    help: 'Compression method used for image cluster compression',
    fallback: 'zlib',
  },
  {
    name: 'keep_data_file',
    type: 'bool',
    help: 'Assume the external data file already exists and do not overwrite it',
    own: true,
  },
  { name: 'size', type: 'size', help: 'Virtual disk size' },
  { name: 'compat', type: 'string', help: 'Compatibility level (v2 [0.10] or v3 [1.1])' },
  { name: 'backing_file', type: 'string', help: 'File name of a base image' },
  { name: 'backing_fmt', type: 'string', help: 'Image format of the base image' },
  { name: 'data_file', type: 'string', help: 'File name of an external data file' },
  { name: 'data_file_raw', type: 'bool', help: 'The external data file must stay valid as a raw image' },
  { name: 'lazy_refcounts', type: 'bool', help: 'Postpone refcount updates', fallback: 'off' },
  { name: 'refcount_bits', type: 'number', help: 'Width of a reference count entry in bits', fallback: '16' },
]

/** Of an image of version 1, in the order in which qemu-img prints them. */
const QCOW_OPTIONS: readonly OptionSpec[] = [
  ...QCOW2_OPTIONS.filter(({ name }) => name === 'size'),
  { name: 'backing_file', type: 'string', help: 'File name of a base image' },
  { name: 'backing_fmt', type: 'string', help: 'Format of the backing image' },
  ...QCOW2_OPTIONS.filter(({ name }) => name === 'encryption'),
  { name: 'encrypt.format', type: 'string', help: "Encrypt the image, format choices: 'aes'" },
  { name: 'encrypt.key-secret', type: 'string', help: 'ID of the secret that provides the AES encryption key' },
]

/** What a product takes. */
function presetOption(...products: readonly string[]): OptionSpec {
  return { name: 'preset', type: 'string', help: `What a product takes: ${products.join(', ')}`, own: true }
}

/** Of a format that has children as QEMU has none. */
const backingOptions = (format: TargetFormat): readonly OptionSpec[] => [
  { name: 'backing_file', type: 'string', help: 'File name of a base image', own: true },
  { name: 'backing_fmt', type: 'string', help: `Must be '${format}' if present`, own: true },
]

/** How an image is encrypted, without the name of the group. */
const LUKS_OPTIONS: readonly OptionSpec[] = [
  ...QCOW2_OPTIONS.filter(({ name }) => name === 'size'),
  { name: 'key-secret', type: 'string', help: 'ID of the secret that provides the keyslot passphrase' },
  ...QCOW2_OPTIONS.flatMap(({ name, ...spec }) => {
    const own = /^encrypt\.((?:cipher|ivgen|hash|iter)-.*)$/.exec(name)?.[1]
    return own === undefined ? [] : [{ ...spec, name: own }]
  }),
  { name: 'detached-header', type: 'bool', help: 'Create a detached LUKS header' },
]

/** Of a VDI image. */
const VDI_OPTIONS: readonly OptionSpec[] = [
  ...QCOW2_OPTIONS.filter(({ name }) => name === 'size'),
  { name: 'static', type: 'bool', help: 'VDI static (pre-allocated) image', fallback: 'off' },
  ...backingOptions('vdi'),
  presetOption('virtualbox'),
]

/** Of a VHD. */
const VPC_OPTIONS: readonly OptionSpec[] = [
  ...QCOW2_OPTIONS.filter(({ name }) => name === 'size'),
  {
    name: 'subformat',
    type: 'string',
    help: 'Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ',
  },
  {
    name: 'force_size',
    type: 'bool',
    help: 'Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation',
  },
  ...backingOptions('vpc'),
  presetOption('azure', 'xenserver'),
]

/** Of a Parallels image. */
const PARALLELS_OPTIONS: readonly OptionSpec[] = [
  ...QCOW2_OPTIONS.filter(({ name }) => name === 'size'),
  { name: 'cluster_size', type: 'size', help: 'Parallels image cluster size', fallback: '1048576' },
]

/** In the order in which qemu-img prints them. */
const VHDX_OPTIONS: readonly OptionSpec[] = [
  { name: 'size', type: 'size', help: 'Virtual disk size; max of 64TB.' },
  { name: 'log_size', type: 'size', help: 'Log size; min 1MB.', fallback: '1048576' },
  {
    name: 'block_size',
    type: 'size',
    help: 'Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.',
    fallback: '0',
  },
  {
    name: 'subformat',
    type: 'string',
    help: "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'.",
  },
  {
    name: 'block_state_zero',
    type: 'bool',
    help:
      "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using 'qemu-img convert' with " +
      'subformat=dynamic.',
  },
  {
    name: 'logical_sector_size',
    type: 'size',
    help: 'Bytes of a sector as the guest sees it: 512 or 4096, which QEMU does not read',
    own: true,
  },
  ...backingOptions('vhdx'),
  presetOption('hyper-v'),
]

/** Some of them, for an image that exists: what is not given stays as it is. */
export const qcow2Options = (...names: readonly string[]): readonly OptionSpec[] =>
  QCOW2_OPTIONS.filter(({ name }) => names.includes(name)).map(({ name, type, help }) => ({ name, type, help }))

const SIZE_OPTIONS = qcow2Options('size')

/** In the order in which qemu-img prints them. */
const VMDK_OPTIONS: readonly OptionSpec[] = [
  ...SIZE_OPTIONS,
  {
    name: 'adapter_type',
    type: 'string',
    help: 'Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX',
  },
  { name: 'backing_file', type: 'string', help: 'File name of a base image' },
  { name: 'backing_fmt', type: 'string', help: "Must be 'vmdk' if present" },
  { name: 'compat6', type: 'bool', help: 'VMDK version 6 image', fallback: 'off' },
  { name: 'hwversion', type: 'string', help: 'VMDK hardware version', fallback: 'undefined' },
  { name: 'toolsversion', type: 'string', help: 'VMware guest tools version' },
  {
    name: 'subformat',
    type: 'string',
    help:
      'VMDK flat extent format, can be one of ' +
      '{monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ',
  },
  { name: 'zeroed_grain', type: 'bool', help: 'Enable efficient zero writes using the zeroed-grain GTE feature' },
  presetOption('esxi', 'ovf'),
]

const ADAPTER_TYPES: readonly string[] = ['ide', 'lsilogic', 'buslogic', 'legacyESX']

/** Options of the file that an image is stored in. */
const FILE_OPTIONS: readonly OptionSpec[] = [
  ...SIZE_OPTIONS,
  { name: 'preallocation', type: 'string', help: 'Preallocation mode (allowed values: off, falloc, full)' },
  { name: 'nocow', type: 'bool', help: 'Turn off copy-on-write (valid only on btrfs)' },
  { name: 'extent_size_hint', type: 'size', help: 'Extent size hint for the image file, 0 to disable' },
]

/** Of an image of each format, and how the shape is read from them. */
const OF_FORMAT: Readonly<
  Record<
    TargetFormat,
    {
      readonly options: readonly OptionSpec[]
      readonly toShape: (values: OptionValues, options: AnyShape, objects: Objects) => AnyShape
    }
  >
> = {
  qcow2: { options: QCOW2_OPTIONS, toShape: toQcow2Shape },
  raw: { options: SIZE_OPTIONS, toShape: (_, options) => options },
  qcow: { options: QCOW_OPTIONS, toShape: toQcowShape },
  luks: { options: LUKS_OPTIONS, toShape: toLuksShape },
  vdi: { options: VDI_OPTIONS, toShape: toVdiShape },
  vpc: { options: VPC_OPTIONS, toShape: toVpcShape },
  parallels: { options: PARALLELS_OPTIONS, toShape: toParallelsShape },
  vhdx: { options: VHDX_OPTIONS, toShape: toVhdxShape },
  vmdk: { options: VMDK_OPTIONS, toShape: toVmdkShape },
}

export function targetFormat(name: string): TargetFormat {
  const format = formatOfWord(name)
  if (format !== undefined && isTarget(format)) return format
  // One that QEMU has is not unknown.
  if (isKnown(name)) {
    const made = listed(TARGET_FORMATS, 'and')
    throw new CommandFailure(`Format driver '${name}' is not supported: formats are ${made}`)
  }
  throw new CommandFailure(`Unknown file format '${name}'`)
}

/** Every option that may be given when a file of this format is made. */
export function optionSpecs(format: TargetFormat): readonly OptionSpec[] {
  const { options } = OF_FORMAT[format]
  const own = new Set(options.map(({ name }) => name))
  return [...options, ...FILE_OPTIONS.filter(({ name }) => !own.has(name))]
}

/** Whether an image can be made with this option. */
export const isCreateOption = (name: string): boolean => QCOW2_OPTIONS.some(spec => spec.name === name)

/** Formats that QEMU knows and makes no images of, or that are not made here. */
const ONLY_READ: readonly string[] = ['bochs', 'cloop', 'dmg']

/** A format that `-o help` asks about. */
export function creatable(name: string): TargetFormat {
  if (ONLY_READ.includes(name)) {
    throw new CommandFailure(`Format driver '${name}' does not support image creation`)
  }
  return targetFormat(name)
}

/** The text of `-o help`. With a file name, the options of the file itself are listed too. */
export function describeFormat(
  format: TargetFormat,
  filename: string | undefined,
  { program }: Pick<Session, 'program'>,
): string {
  const offered = (specs: readonly OptionSpec[]): string =>
    optionHelp(specs.filter(({ own }) => program !== 'qemu-img' || own !== true))
  if (filename !== undefined) return `Supported options:\n${offered(optionSpecs(format))}`
  return (
    `Supported ${format} options:\n${offered(OF_FORMAT[format].options)}\n` +
    'The protocol level may support further options.\nSpecify the target filename to include those options.\n'
  )
}

/** What the library is told of an `-o` list; the size is the command's own matter. */
export function toCreateOptions(values: OptionValues, format: TargetFormat, objects: Objects): AnyShape {
  const options: AnyShape = {}
  const preallocation = choice(values, 'preallocation', creationOf(format).preallocation)
  if (preallocation) options.preallocation = preallocation
  return OF_FORMAT[format].toShape(values, options, objects)
}

function toLuksShape(values: OptionValues, options: AnyShape, objects: Objects): AnyShape {
  if (values.get('detached-header') === true) {
    throw unsupported("Option 'detached-header'", 'this version writes the header in front of the data')
  }
  return { ...options, encrypt: toEncryption('luks', values, '', objects) }
}

function toVdiShape(values: OptionValues, options: AnyShape): AnyShape {
  const isStatic = values.get('static')
  const words = { ...presetOf(values, 'vdi'), ...backingOf(values, 'vdi') }
  return { ...options, ...words, ...(typeof isStatic === 'boolean' && { static: isStatic }) }
}

/** A word that an option has to be, in QEMU's words for what it is not. */
function known(values: OptionValues, name: string, allowed: readonly string[]): string | undefined {
  const value = text(values, name)
  if (value === undefined || allowed.includes(value)) return value
  throw new CommandFailure(`invalid parameter value: ${value}`)
}

function presetOf(values: OptionValues, format: TargetFormat): Pick<AnyShape, 'preset'> {
  const preset = known(values, 'preset', creationOf(format).presets ?? [])
  return preset === undefined ? {} : { preset }
}

/** The backing file of a format that takes any. */
function anyBackingOf(values: OptionValues): Pick<AnyShape, 'backingFile' | 'backingFormat'> {
  const backingFile = text(values, 'backing_file')
  const backingFormat = choice<Format>(values, 'backing_fmt', SOURCE_FORMATS)
  return {
    ...(backingFile !== undefined && { backingFile: toName(backingFile) }),
    ...(backingFormat !== undefined && { backingFormat }),
  }
}

/** The backing file of a format that takes none but its own. */
function backingOf(values: OptionValues, format: TargetFormat): Pick<AnyShape, 'backingFile' | 'backingFormat'> {
  const { backingFormat } = creationOf(format)
  const named = text(values, 'backing_fmt')
  if (named !== undefined && (backingFormat === undefined || formatOfWord(named) !== backingFormat)) {
    throw new CommandFailure(`backing_file must be a ${backingFormat} image`)
  }
  const backingFile = text(values, 'backing_file')
  return backingFile === undefined ? {} : { backingFile: toName(backingFile), backingFormat }
}

function toVpcShape(values: OptionValues, options: AnyShape): AnyShape {
  const subformat = choice(values, 'subformat', creationOf('vpc').subformats ?? [])
  const forceSize = values.get('force_size')
  return {
    ...options,
    ...(subformat !== undefined && { subformat }),
    ...(typeof forceSize === 'boolean' && { forceSize }),
    ...presetOf(values, 'vpc'),
    ...backingOf(values, 'vpc'),
  }
}

/** As QEMU, which takes whole sectors. */
function toParallelsShape(values: OptionValues, options: AnyShape): AnyShape {
  const clusterSize = values.get('cluster_size')
  if (typeof clusterSize !== 'bigint') return options
  return { ...options, clusterSize: Number(((clusterSize + 511n) / 512n) * 512n) }
}

const MIB = 1n << 20n

/** As QEMU does, sizes are rounded up to what the format has. */
function toVhdxShape(values: OptionValues, options: AnyShape): AnyShape {
  const subformat = text(values, 'subformat')
  if (subformat !== undefined) options.subformat = choice(values, 'subformat', ['dynamic', 'fixed'])
  const whole = (bytes: bigint) => ((bytes + MIB - 1n) / MIB) * MIB
  const blockSize = values.get('block_size')
  if (typeof blockSize === 'bigint') options.blockSize = Number(whole(blockSize))
  const logSize = values.get('log_size')
  if (typeof logSize === 'bigint') options.logSize = Number(whole(logSize))
  const blockStateZero = values.get('block_state_zero')
  if (typeof blockStateZero === 'boolean') options.blockStateZero = blockStateZero
  const sector = values.get('logical_sector_size')
  if (sector !== undefined && sector !== 512n && sector !== 4096n) {
    throw new CommandFailure(`logical_sector_size must be 512 or 4096, not ${sector}`)
  }
  if (sector !== undefined) options.logicalSectorSize = Number(sector)
  return { ...options, ...presetOf(values, 'vhdx'), ...backingOf(values, 'vhdx') }
}

function toVmdkShape(values: OptionValues, options: AnyShape): AnyShape {
  const { subformats = [] } = creationOf('vmdk')
  const backing = backingOf(values, 'vmdk')
  const adapterType = known(values, 'adapter_type', ADAPTER_TYPES)
  const subformat = known(values, 'subformat', subformats)
  const hardware = text(values, 'hwversion')
  const hardwareVersion = hardware === 'undefined' ? undefined : hardware
  const compat6 = values.get('compat6') === true
  if (compat6 && hardwareVersion !== undefined) throw new CommandFailure('compat6 cannot be enabled with hwversion set')
  const zeroedGrain = values.get('zeroed_grain') === true
  const flat = subformat?.endsWith('Flat') ?? false
  if (flat && backing.backingFile !== undefined) throw new CommandFailure("Flat image can't have backing file")
  if (flat && zeroedGrain) throw new CommandFailure("Flat image can't enable zeroed grain")
  return {
    ...options,
    ...presetOf(values, 'vmdk'),
    subformat,
    adapterType,
    hardwareVersion,
    toolsVersion: text(values, 'toolsversion'),
    compat6,
    zeroedGrain,
    ...backing,
  }
}

/** Not encrypted: its only cipher is weak, and nothing that exists needs new images with it. */
function toQcowShape(values: OptionValues, options: AnyShape): AnyShape {
  const encrypt = [...values.keys()].find(name => name.startsWith('encrypt') && values.get(name) !== false)
  if (encrypt !== undefined) {
    throw unsupported(
      `Option '${encrypt}'`,
      'a qcow image has legacy AES alone, which is weak: use luks in a qcow2 image',
    )
  }
  return { ...options, ...anyBackingOf(values) }
}

function toQcow2Shape(values: OptionValues, options: AnyShape, objects: Objects): AnyShape {
  // "Off" is what is done anyway.
  if (values.get('encryption') === true) {
    throw unsupported("Option 'encryption'", 'the legacy AES encryption is asked for by encrypt.format=aes')
  }
  const encrypt = toEncrypt(values, objects)
  if (encrypt !== undefined) options.encrypt = encrypt
  const compat = text(values, 'compat')
  const version = compat === undefined ? undefined : toVersion(compat)
  if (compat !== undefined && version === undefined) {
    throw new CommandFailure(`Parameter 'version' does not accept value '${compat}'`)
  }
  if (version) options.version = version
  const clusterSize = values.get('cluster_size')
  if (typeof clusterSize === 'bigint') options.clusterSize = Number(clusterSize)
  const extendedL2 = values.get('extended_l2')
  if (typeof extendedL2 === 'boolean') options.extendedL2 = extendedL2
  const lazyRefcounts = values.get('lazy_refcounts')
  if (typeof lazyRefcounts === 'boolean') options.lazyRefcounts = lazyRefcounts
  const compressionType = choice(values, 'compression_type', ['zlib', 'zstd'] as const)
  if (compressionType) options.compressionType = compressionType
  const refcountBits = values.get('refcount_bits')
  if (typeof refcountBits === 'bigint') options.refcountBits = toRefcountBits(refcountBits)
  Object.assign(options, anyBackingOf(values))
  const dataFile = text(values, 'data_file')
  if (dataFile !== undefined) options.dataFile = toName(dataFile)
  const dataFileRaw = values.get('data_file_raw')
  if (typeof dataFileRaw === 'boolean') options.dataFileRaw = dataFileRaw
  const keepDataFile = values.get('keep_data_file')
  if (typeof keepDataFile === 'boolean') options.keepDataFile = keepDataFile
  checkShape(options)
  return options
}

const text = (values: OptionValues, name: string): string | undefined => {
  const value: OptionValue | undefined = values.get(name)
  return typeof value === 'string' ? value : undefined
}

function choice<T extends string>(values: OptionValues, name: string, allowed: readonly T[]): T | undefined {
  const value = text(values, name)
  const found = allowed.find(candidate => candidate === value)
  if (value !== undefined && found === undefined) {
    throw new CommandFailure(`Parameter '${name.replaceAll('_', '-')}' does not accept value '${value}'`)
  }
  return found
}

/** The version that a compatibility level names. */
export function toVersion(compat: string): 2 | 3 | undefined {
  if (compat === '0.10' || compat === 'v2') return 2
  return compat === '1.1' || compat === 'v3' ? 3 : undefined
}

const REFCOUNT_WIDTHS = [1, 2, 4, 8, 16, 32, 64] as const

/** A width of refcounts that there is. */
export function toRefcountBits(bits: OptionValue): (typeof REFCOUNT_WIDTHS)[number] {
  const width = REFCOUNT_WIDTHS.find(candidate => BigInt(candidate) === bits)
  if (width === undefined) {
    throw new CommandFailure('Refcount width must be a power of two and may not exceed 64 bits')
  }
  return width
}

/** File systems that a hint means something to, by their magic numbers, and what is said where it is not followed. */
const FILE_HINTS = [
  { name: 'nocow', type: 0x9123683e, advice: "set it for the folder with 'chattr +C'" },
  { name: 'extent_size_hint', type: 0x58465342, advice: "set it for the folder with 'xfs_io -c extsize'" },
] as const

/** Hints to the file system are left to the folder's own settings; that is said where the file system knows them. */
export function warnOfFileHints(values: OptionValues, filename: string, session: Session): void {
  const given = FILE_HINTS.filter(
    ({ name }) => values.has(name) && values.get(name) !== false && values.get(name) !== 0n,
  )
  if (given.length === 0) return
  // What the file lies on does not matter to the image, which is there.
  const type = fileSystemOf(filename)
  for (const { name, advice } of given.filter(hint => hint.type === type)) {
    session.stderr.write(`${session.program}: warning: ${filename}: ${name} is not set: ${advice}\n`)
  }
}

/** How the new image is encrypted. */
function toEncrypt(values: OptionValues, objects: Objects): Encrypt | undefined {
  const format = choice(values, 'encrypt.format', ['luks', 'aes'] as const)
  if (format === undefined) {
    const lone = [...values.keys()].find(name => name.startsWith('encrypt.'))
    if (lone !== undefined) throw new CommandFailure(`Parameter '${lone}' needs encrypt.format`)
    return undefined
  }
  if (format === 'aes' && values.get('encrypt.allow-weak') !== true) {
    const reason = 'the legacy AES encryption is weak: use luks, or add encrypt.allow-weak=on'
    throw unsupported("Option 'encrypt.format=aes'", reason)
  }
  return toEncryption(format, values, 'encrypt.', objects)
}

/** By options whose names begin with `prefix`. */
function toEncryption(
  format: 'luks' | 'aes',
  values: OptionValues,
  prefix: 'encrypt.' | '',
  objects: Objects,
): Encrypt {
  const id = text(values, `${prefix}key-secret`)
  if (id === undefined) throw new CommandFailure(`Parameter '${prefix}key-secret' is required for cipher`)
  // Whoever names a cipher by qemu-img's options gets what qemu-img makes.
  const encrypt: Encrypt = { format, secret: objects.secret(id), allowWeak: true }
  const cipherAlg = choice(values, `${prefix}cipher-alg`, CIPHER_ALGS)
  if (cipherAlg !== undefined) encrypt.cipherAlg = cipherAlg
  const cipherMode = choice(values, `${prefix}cipher-mode`, CIPHER_MODES)
  if (cipherMode !== undefined) encrypt.cipherMode = cipherMode
  const ivgenAlg = choice(values, `${prefix}ivgen-alg`, IVGEN_ALGS)
  if (ivgenAlg !== undefined) encrypt.ivgenAlg = ivgenAlg
  const ivgenHashAlg = choice(values, `${prefix}ivgen-hash-alg`, HASH_ALGS)
  if (ivgenHashAlg !== undefined) encrypt.ivgenHashAlg = ivgenHashAlg
  const hashAlg = choice(values, `${prefix}hash-alg`, HASH_ALGS)
  if (hashAlg !== undefined) encrypt.hashAlg = hashAlg
  const iterTime = values.get(`${prefix}iter-time`)
  if (typeof iterTime === 'bigint') encrypt.iterTime = toIterTime(iterTime, prefix)
  return encrypt
}

/** Milliseconds that a guess of a secret takes. */
export function toIterTime(milliseconds: bigint, prefix = 'encrypt.'): number {
  if (milliseconds >= 1n && milliseconds <= 60_000n) return Number(milliseconds)
  throw new CommandFailure(`Parameter '${prefix}iter-time' must be 1 to 60000 milliseconds, not ${milliseconds}`)
}

/** The size of the new disk from `-o size=`. */
export const sizeOption = (values: OptionValues): number | bigint | undefined => {
  const size = values.get('size')
  return typeof size === 'bigint' ? toSize(size) : undefined
}

/** The magic number of the file system that a file lies on; undefined where that is not known. */
function fileSystemOf(filename: string): number | undefined {
  try {
    return statfsSync(imagePath(filename)).type
  } catch {
    return undefined
  }
}
