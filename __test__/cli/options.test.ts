import { describe, expect, it } from 'vitest'
import { describeFormat, optionSpecs, targetFormat, toCreateOptions } from '../../dist/cli/create-options.js'
import { asksForHelp, describeOptions, joinOptionLists, parseOptionList } from '../../dist/cli/options.js'
import { Objects } from '../../dist/cli/secrets.js'

const qcow2 = optionSpecs('qcow2')
const parse = (list: string) => Object.fromEntries(parseOptionList(list, qcow2))

describe('-o lists', () => {
  it('reads values by their type', () => {
    expect(parse('cluster_size=2M,lazy_refcounts=on,compat=1.1,refcount_bits=0x10')).toEqual({
      cluster_size: 2n << 20n,
      lazy_refcounts: true,
      compat: '1.1',
      refcount_bits: 16n,
    })
  })

  it('takes a doubled comma as one of the value', () => {
    expect(parse('backing_file=a,,b,compat=v3')).toEqual({ backing_file: 'a,b', compat: 'v3' })
    expect(parse('backing_file=a,,,compat=v3')).toEqual({ backing_file: 'a,', compat: 'v3' })
    expect(parse('backing_file=a=b')).toEqual({ backing_file: 'a=b' })
    expect(parse('backing_file=')).toEqual({ backing_file: '' })
  })

  it('takes a name alone as on, and with "no" as off', () => {
    expect(parse('lazy_refcounts')).toEqual({ lazy_refcounts: true })
    expect(parse('nolazy_refcounts,extended_l2')).toEqual({ lazy_refcounts: false, extended_l2: true })
  })

  it('lets the last setting win', () => {
    expect(parse(joinOptionLists('cluster_size=4k,compat=0.10', 'cluster_size=8k'))).toEqual({
      cluster_size: 8192n,
      compat: '0.10',
    })
  })

  it.each(['', ',', ',,', ',help', 'backing_file=x,', 'a,,,'])(
    'refuses "%s", which would not survive joining',
    list => {
      expect(() => joinOptionLists(undefined, list)).toThrow(`Invalid option list: ${list}`)
    },
  )

  it.each([
    ['foo=bar', "Invalid parameter 'foo'"],
    ['nofoo', "Invalid parameter 'nofoo'"],
    ['lazy_refcounts=maybe', "Parameter 'lazy_refcounts' expects 'on' or 'off'"],
    ['cluster_size=abc', "Parameter 'cluster_size' expects a non-negative number below 2^64"],
    ['size=-1024', "Value '-1024' is out of range for parameter 'size'"],
    ['size=-1k', "Parameter 'size' expects a non-negative number below 2^64"],
    ['size', "Parameter 'size' expects a non-negative number below 2^64"],
    ['refcount_bits=abc', "Parameter 'refcount_bits' expects a number"],
    ['refcount_bits=18446744073709551616', "Value '18446744073709551616' is too large for parameter 'refcount_bits'"],
  ])('refuses %s', (list, message) => {
    expect(() => parse(list)).toThrow(message)
  })

  it('sees a question for help, and nothing else, as one', () => {
    expect(['help', '?', 'cluster_size=4k,help', 'help,cluster_size=4k'].map(asksForHelp)).not.toContain(false)
    expect(['cluster_size=help', 'helpme', 'help=on', 'backing_file=a,,help'].map(asksForHelp)).not.toContain(true)
  })

  it('prints settings in the order of qemu-img, with its defaults', () => {
    const values = parseOptionList('refcount_bits=8,backing_file=a,,b,size=1M,data_file_raw=on', qcow2)
    expect(describeOptions(values, qcow2)).toBe(
      'cluster_size=65536 extended_l2=off compression_type=zlib size=1048576 backing_file=a,,b data_file_raw=on ' +
        'lazy_refcounts=off refcount_bits=8',
    )
    expect(describeOptions(parseOptionList('size=5', optionSpecs('raw')), optionSpecs('raw'))).toBe('size=5')
  })
})

describe('creation options', () => {
  const convert = (list: string) => toCreateOptions(parseOptionList(list, qcow2), 'qcow2', new Objects())

  it('reach the library under its names', () => {
    expect(
      convert(
        'compat=1.1,cluster_size=4k,extended_l2=off,lazy_refcounts=on,preallocation=falloc,compression_type=zstd,' +
          'refcount_bits=1,data_file=d.raw,data_file_raw=on',
      ),
    ).toEqual({
      version: 3,
      clusterSize: 4096,
      extendedL2: false,
      lazyRefcounts: true,
      preallocation: 'falloc',
      compressionType: 'zstd',
      refcountBits: 1,
      dataFile: 'd.raw',
      dataFileRaw: true,
    })
    expect(convert('compat=v2,encryption=off,nocow=off,extent_size_hint=0')).toEqual({ version: 2 })
  })

  it.each([
    ['compat=0.42', "Parameter 'version' does not accept value '0.42'"],
    ['preallocation=1234', "Parameter 'preallocation' does not accept value '1234'"],
    ['compression_type=lz4', "Parameter 'compression-type' does not accept value 'lz4'"],
    ['refcount_bits=7', 'Refcount width must be a power of two and may not exceed 64 bits'],
    ['compat=v2,lazy_refcounts=on', 'Lazy refcounts only supported with compatibility level 1.1 and above'],
    ['cluster_size=3k', 'Cluster size must be a power of two between 512 and 2048k'],
    ['backing_fmt=raw', 'Backing format cannot be used without backing file'],
    ['encryption=on', "Option 'encryption' is not supported"],
    ['encrypt.format=luks', "Parameter 'encrypt.key-secret' is required for cipher"],
    ['encrypt.format=luks,encrypt.key-secret=s', "No secret with id 's'"],
    ['encrypt.format=aes,encrypt.key-secret=s', "Option 'encrypt.format=aes' is not supported"],
    ['encrypt.iter-time=10', "Parameter 'encrypt.iter-time' needs encrypt.format"],
  ])('%s is refused', (list, message) => {
    expect(() => convert(list)).toThrow(message)
  })

  it('are listed by format', () => {
    expect(describeFormat('raw', undefined, { program: 'qcow2' })).toBe(
      'Supported raw options:\n' +
        '  size=<size>            - Virtual disk size\n' +
        '\n' +
        'The protocol level may support further options.\n' +
        'Specify the target filename to include those options.\n',
    )
    expect(() => targetFormat('qed')).toThrow("Format driver 'qed' is not supported")
    expect(() => targetFormat('foo')).toThrow("Unknown file format 'foo'")
  })
})
